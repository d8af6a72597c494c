"""Activation scales: the MSE optimum of the candidates, booked under the right row, on the float model's own values."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn

from hqc.calibration import calibrate
from hqc.capture import trace
from hqc.capture.sources import Source
from hqc.errors import PlanError, TrainingError
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.passes.insert_qdq import grouped
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec, Origin, Program
from hqc.sampling.task import Denoise

GRID = (0.0, 250.0, 500.0, 750.0)


class _OneSite(nn.Module):
    """The site `conv` reads the sample itself, times a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 8, 1)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample * self.gain) + timestep.view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def one_site() -> Program:
    torch.manual_seed(0)
    inputs = (InputSpec("sample", ("N", 32, 4, 4)), InputSpec("timestep", ("N",)))
    return trace(Source(_OneSite(), inputs, Origin(source="one_site")))


def _quantised(program: Program, bits: str, *, rotate: bool) -> Program:
    rotation = [InsertHadamard(block=32)] if rotate else []
    return run_pipeline(program, [SelectLayers(bits=bits), *rotation, InsertQdq(timesteps=GRID)])


def _sample(seed: int, gain: float = 1.0) -> Tensor:
    """Normal numbers with a few large ones, as activations have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 32, 4, 4, generator=generator)
    return gain * x * (1 + 4 * (torch.rand(2, 32, 1, 1, generator=generator) > 0.9))


def _loop(*calls: tuple[Tensor, float]) -> Callable[[Denoise], None]:
    def run(model: Denoise) -> None:
        for sample, time in calls:
            model(sample, torch.full((len(sample),), time), None)

    return run


def _squared_error(x: np.ndarray, scale: float, top: int) -> float:
    """Σ (x - s·clip(round(x/s)))² in float64."""
    return float(np.square(x - scale * np.clip(np.round(x / scale), -top, top)).sum())


def _rotated(x: Tensor) -> np.ndarray:
    """Ĥ·x over 32 channels from scratch: H[i, j] = (-1)^popcount(i & j)."""
    matrix = np.array([[(-1) ** bin(i & j).count("1") for j in range(32)] for i in range(32)]) / np.sqrt(32)
    return np.einsum("ij,njhw->nihw", matrix, x.double().numpy())


@pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(("bits", "top"), [("w4a4", 7), ("w4a3", 3), ("w8a8", 127)])
def test_the_scale_is_the_best_candidate(one_site: Program, bits: str, top: int, rotate: bool) -> None:
    """Every candidate is tried by brute force in float64; the one found must be as good as the best of them."""
    x = _sample(1)
    program = calibrate(_quantised(one_site, bits, rotate=rotate), _loop((x, 250.0)), candidates=60)
    values = _rotated(x) if rotate else x.double().numpy()
    candidates = np.abs(values).max() / top * np.linspace(1 / 60, 1.05, 60)
    errors = [_squared_error(values, scale, top) for scale in candidates]
    found = float(program.state["conv.activation_scale_table"][1])
    # float32 sums of 1024 squares; float32 places of the candidates.
    assert _squared_error(values, found, top) <= min(errors) * (1 + 1e-3)
    assert found == pytest.approx(candidates[int(np.argmin(errors))], rel=0.05)
    # It matters which one: the full range is worse at low bits.
    assert top == 127 or _squared_error(values, np.abs(values).max() / top, top) > 1.2 * min(errors)


def test_several_calls_at_one_timestep_are_searched_together(one_site: Program) -> None:
    """A later batch may be wider than the first: the scale must serve both."""
    first, second = _sample(1), _sample(2, gain=3.0)
    values = torch.cat([first, second]).double().numpy()
    for bits, top in (("w4a4", 7), ("w8a8", 127)):
        program = calibrate(_quantised(one_site, bits, rotate=False), _loop((first, 0.0), (second, 0.0)))
        found = float(program.state["conv.activation_scale_table"][0])
        candidates = np.abs(values).max() / top * np.linspace(1 / 200, 1.05, 200)
        best = min(_squared_error(values, scale, top) for scale in candidates)
        # The candidates of the wider range are spaced by 1/60 of it, and the first batch's error at scales beyond its
        # own range is the s²/12 of a uniform rounding error.
        assert _squared_error(values, found, top) <= 1.1 * best


def test_the_order_of_the_calls_does_not_matter_much(one_site: Program) -> None:
    wide, narrow = _sample(2, gain=3.0), _sample(1)
    program = _quantised(one_site, "w8a8", rotate=False)
    one = calibrate(program, _loop((wide, 0.0), (narrow, 0.0))).state["conv.activation_scale_table"][0]
    other = calibrate(program, _loop((narrow, 0.0), (wide, 0.0))).state["conv.activation_scale_table"][0]
    assert float(one) == pytest.approx(float(other), rel=0.1)  # a few of 60 candidates


def test_each_timestep_has_a_row_and_unvisited_rows_take_the_nearest(one_site: Program) -> None:
    loop = _loop((_sample(1), 0.0), (_sample(1, gain=8.0), 740.0))
    table = calibrate(_quantised(one_site, "w4a4", rotate=False), loop).state["conv.activation_scale_table"]
    assert table[3] == pytest.approx(8 * float(table[0]), rel=1e-5)  # 740 is booked under 750
    assert table.tolist() == [table[0], table[0], table[3], table[3]]


def test_zeros_before_small_values_do_not_matter(one_site: Program) -> None:
    program, small = _quantised(one_site, "w4a4", rotate=False), (_sample(1, gain=1e-3), 0.0)
    alone = calibrate(program, _loop(small)).state["conv.activation_scale_table"]
    after = calibrate(program, _loop((torch.zeros(2, 32, 4, 4), 0.0), small)).state["conv.activation_scale_table"]
    assert torch.equal(alone, after)


def test_an_all_zero_activation_gets_scale_one(one_site: Program) -> None:
    program = calibrate(_quantised(one_site, "w4a4", rotate=False), _loop((torch.zeros(2, 32, 4, 4), 0.0)))
    table = program.state["conv.activation_scale_table"]
    assert torch.isfinite(table).all()
    assert (table > 0).all()


def test_the_quantisers_are_bypassed_while_observing(one_site: Program) -> None:
    """What the loop gets back is the float program's own output, not the quantised one's."""
    x, time = _sample(3), torch.full((2,), 250.0)
    outputs: list[Tensor] = []
    program = _quantised(one_site, "w2a2", rotate=True)
    calibrate(program, lambda model: outputs.append(model(x, time, None)))
    wanted = one_site.module()(x, time)
    # A rotation and its inverse in float32.
    torch.testing.assert_close(outputs[0], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert not outputs[0].requires_grad
    quantised = calibrate(program, lambda model: model(x, time, None)).module()(x, time)
    assert float((quantised - wanted).norm() / wanted.norm()) > 1e-4


def test_the_program_given_stays_as_it_was(one_site: Program) -> None:
    program = _quantised(one_site, "w4a4", rotate=True)
    before = zoo.fingerprint(program)
    result = calibrate(program, _loop((_sample(1), 0.0)))
    assert zoo.fingerprint(program) == before
    assert zoo.fingerprint(result) != before


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_nan_names_the_site_and_the_timestep(one_site: Program) -> None:
    program = _quantised(one_site, "w4a4", rotate=False)
    broken = dict(program.state)
    broken["gain"] = torch.tensor([float("nan")])
    with pytest.raises(TrainingError) as caught:
        calibrate(program.evolve(state=broken), _loop((_sample(1), 500.0)))
    assert str(caught.value).startswith("calibration at conv: met NaN or infinity at timestep 500. ")


def test_infinity_is_found_too(one_site: Program) -> None:
    program = _quantised(one_site, "w4a4", rotate=False)
    program = program.evolve(state=dict(program.state) | {"gain": torch.tensor([float("inf")])})
    with pytest.raises(TrainingError, match="calibration at conv: met NaN or infinity at timestep 0"):
        calibrate(program, _loop((_sample(1), 0.0)))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loop_that_gives_no_finite_sample_is_not_blamed_on_the_weights(one_site: Program, value: float) -> None:
    x = _sample(1)
    x[0, 0, 0, 0] = value
    with pytest.raises(TrainingError, match="is given NaN or infinity at timestep 250: sampling gave them"):
        calibrate(_quantised(one_site, "w4a4", rotate=False), _loop((x, 250.0)))


def test_a_loop_that_never_calls_the_model_is_refused(one_site: Program) -> None:
    with pytest.raises(TrainingError, match="the forward loop never called the model"):
        calibrate(_quantised(one_site, "w4a4", rotate=False), lambda model: None)


def test_mixed_timesteps_in_one_call_are_refused(one_site: Program) -> None:
    with pytest.raises(TrainingError, match="one call mixes timesteps"):
        calibrate(
            _quantised(one_site, "w4a4", rotate=False),
            lambda model: model(_sample(1), torch.tensor([0.0, 250.0]), None),
        )


def test_a_program_without_quantised_sites_needs_no_loop(one_site: Program) -> None:
    float_ = run_pipeline(one_site, [SelectLayers(keep_float=("*",)), InsertQdq(timesteps=GRID)])
    assert calibrate(float_, lambda model: None).plan.quantised == ()


@pytest.mark.parametrize("weights", [False, True], ids=["single", "double"])
def test_a_regular_rotation_is_calibrated_rotated(one_site: Program, weights: bool) -> None:
    """The float model's own values pass through, whether the activation is rotated back or the weight is rotated."""
    x = _sample(1)
    chain = [SelectLayers(bits="w4a4"), InsertHadamard(16, kind="regular", weights=weights), InsertQdq(timesteps=GRID)]
    outputs: list[Tensor] = []

    def loop(model: Denoise) -> None:
        outputs.append(model(x, torch.full((len(x),), 250.0), None))

    program = calibrate(run_pipeline(one_site, chain), loop, candidates=60)
    assert torch.allclose(outputs[0], one_site.module()(x, torch.full((len(x),), 250.0)), atol=1e-4)
    values = torch.ops.hqc.hadamard(x, 16, 1, True).double().numpy()
    candidates = np.abs(values).max() / 7 * np.linspace(1 / 60, 1.05, 60)
    best = min(candidates, key=lambda scale: _squared_error(values, scale, 7))
    assert float(program.state["conv.activation_scale_table"][1]) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(("groups", "wanted"), [(1, 1), (3, 3), (4, 4), (10, 10), (50, 10)])
def test_groups_are_runs_of_neighbours(groups: int, wanted: int) -> None:
    """By hand: as equally long as can be, from the least; every timestep's nearest middle is its own."""
    times = [float(t) for t in range(1, 1000, 100)]
    middles = torch.tensor(grouped(times, groups))
    rows = torch.ops.hqc.nearest_timestep(torch.tensor(times), middles).tolist()
    hand = {
        1: [0] * 10,
        3: [0, 0, 0, 1, 1, 1, 2, 2, 2, 2],
        4: [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
        10: list(range(10)),
    }
    assert rows == hand[wanted]


@pytest.mark.parametrize("activation", ["symmetric", "asymmetric"])
def test_a_group_is_calibrated_on_all_of_its_timesteps(one_site: Program, activation: str) -> None:
    """Its scale is that of one table row that has seen just these calls."""
    times, gains = (700.0, 500.0, 300.0, 100.0), (8.0, 2.0, 1.0, 0.5)
    calls = [(_sample(seed, gain), t) for seed, (t, gain) in enumerate(zip(times, gains, strict=True))]

    def calibrated(calls: list[tuple[Tensor, float]], groups: int) -> dict[str, Tensor]:
        insert = InsertQdq(times, activation=activation, groups=groups)
        program = run_pipeline(one_site, [SelectLayers(bits="w4a4"), insert])
        found = calibrate(program, _loop(*calls)).state
        return {name: value for name, value in found.items() if name.endswith("_table")}

    together = calibrated(calls, 2)
    alone = [calibrated(part, 1) for part in (calls[2:], calls[:2])]
    for name, table in together.items():
        assert table.tolist() == [float(part[name]) for part in alone], name
    assert together["conv.activation_scale_table"][1] > 2 * together["conv.activation_scale_table"][0]


def test_groups_that_make_no_sense_are_refused() -> None:
    for options, said in (({"groups": -1}, "groups is -1"), ({"groups": 2, "static": True}, "is static and has 2")):
        with pytest.raises(PlanError, match=said):
            InsertQdq(**options)
