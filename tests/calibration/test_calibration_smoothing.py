"""Smoothing factors: the grid against a search by hand, rows against unfold, what must not change, refusals."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hqc.calibration import CalibrateActivations, CalibrateWeights, ChooseRotation, Smooth
from hqc.calibration.rotations import quantised_activation
from hqc.calibration.site_rows import SiteRows, _rows, collect
from hqc.calibration.smoothing import _pairs, _Site, smoothing_factors, timestep_range_factors
from hqc.calibration.weights import mse_weight_scale
from hqc.capture import trace
from hqc.capture.sources import Source
from hqc.errors import MemoryShortError, PipelineTextError, TrainingError
from hqc.passes import InsertHadamard, InsertQdq, InsertSmoothing, SelectLayers
from hqc.passes.rewriting import CONV
from hqc.pipeline import run_pass, run_pipeline, run_procedure
from hqc.plan import SitePlan
from hqc.program import InputSpec, Origin, Program, is_op
from hqc.sampling import Sampler, Work, synthetic_task
from hqc.sites import source_of
from hqc.structure import site_problems

SAMPLER = Sampler(3, 1.0, 0.0)
QUICK = Smooth(samples=2, timesteps=2, rows=24)


class _Outliers(nn.Module):
    """A convolution and a linear layer with one input channel far larger, whose weights are small, and one of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 16)
        gains = torch.ones(16)
        gains[3], gains[7], gains[11] = 60.0, 0.05, 0.0
        for layer in (self.conv, self.head):
            layer.weight.data[:, 3] /= 60
        self.register_buffer("gains", gains.view(1, 16, 1, 1))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = (sample + (timestep / 1000).view(-1, 1, 1, 1)) * self.gains
        tokens = (torch.tanh(self.conv(x)) * self.gains).flatten(2).transpose(1, 2)
        return self.head(tokens).transpose(1, 2).view(x.shape)


@pytest.fixture(scope="module")
def inserted() -> Program:
    torch.manual_seed(3)
    inputs = (InputSpec("sample", ("N", 16, 4, 4)), InputSpec("timestep", ("N",)))
    program = trace(Source(_Outliers(), inputs, Origin(source="outliers")))
    return run_pipeline(program, [SelectLayers(bits="w4a4"), InsertSmoothing()])


def _work(program: Program) -> Work:
    return Work(program, synthetic_task(program), SAMPLER)


def _seen(program: Program, step: Smooth) -> dict[str, SiteRows]:
    inputs = {site: source_of(layer) for site, layer in program.sites()}
    options = {"samples": step.samples, "timesteps": step.timesteps, "rows": step.rows, "seed": step.seed}
    return collect(program, inputs, _work(program), "testing", **options)


# ---- factors -------------------------------------------------------------------------------------------------------


def test_factors_are_the_formula() -> None:
    generator = torch.Generator().manual_seed(5)
    largest, weight = torch.rand(6, generator=generator) + 0.1, torch.randn(4, 6, 3, 3, generator=generator)
    wanted = largest.numpy() ** 0.7 / np.abs(weight.numpy()).max(axis=(0, 2, 3)) ** 0.3
    found = smoothing_factors(largest, weight, 0.7, 0.3).numpy()
    np.testing.assert_allclose(found / found[0], wanted / wanted[0], rtol=1e-5)
    assert np.log(found).mean() == pytest.approx(0, abs=1e-5)


def test_factors_of_zeros_and_extremes() -> None:
    weight = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]])
    found = smoothing_factors(torch.tensor([1e9, 0.0, 1.0, 1e-9, 1.0]), weight, 1.0, 0.0)
    torch.testing.assert_close(found, torch.tensor([1024.0, 1.0, 1.0, 1 / 1024, 1.0]))
    assert bool((smoothing_factors(torch.zeros(5), weight, 0.5, 0.5) == 1).all())


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_windows_and_tokens(captured: Callable[[str], Program]) -> None:
    """Strides, dilations, uneven kernels and paddings: each row is one that the layer computes with."""
    program = run_pass(captured("geometry"), SelectLayers())
    generator = torch.Generator().manual_seed(1)
    for site, layer in program.sites():
        weight = program.state[f"{site}.weight"]
        x = torch.randn([3, *layer.args[0].meta["shape"][1:]], generator=generator)
        rows = _rows(layer, x, 40, generator)
        if is_op(layer, CONV):
            stride, padding, dilation = (list(layer.args[i]) if len(layer.args) > i else d for i, d in GEOMETRY)
            windows = functional.unfold(x, weight.shape[2:], dilation, padding, stride)
            windows = windows.transpose(1, 2).flatten(0, 1)
        else:
            windows = x.reshape(-1, x.shape[-1])
        at = torch.cdist(rows.double(), windows.double()).min(1)
        assert float(at.values.max()) < 1e-6, site
        assert len(set(at.indices.tolist())) > min(len(windows), 40) // 3, site


GEOMETRY = ((3, [1, 1]), (4, [0, 0]), (5, [1, 1]))


def test_the_largest_is_of_every_step(inserted: Program) -> None:
    few = _seen(inserted, Smooth(samples=2, timesteps=1, rows=3))
    many = _seen(inserted, Smooth(samples=2, timesteps=3, rows=500))
    for site in few:
        assert torch.equal(few[site].largest, many[site].largest)
        assert [len(few[site].rows), len(many[site].rows)] == [1, 3]
        channels = torch.cat(many[site].rows).view(1500, 16, -1).abs().amax((0, 2))
        torch.testing.assert_close(channels, many[site].largest)  # 500 rows of 32 tokens: all of them
    assert float(few["conv"].largest[11]) == 0


# ---- the search ------------------------------------------------------------------------------------------------------


def _by_hand(weight: np.ndarray, seen: SiteRows) -> tuple[float, float]:
    """(a, b) with the least output error, in plain numpy."""
    window = weight[0, 0].size
    errors = {}
    for a, b in [(0.0, 0.0)] + [p for i in range(1, 20) for p in ((i / 20, 0.0), (i / 20, 1 - i / 20))]:
        of_weight = np.abs(weight).max(axis=(0, *range(2, weight.ndim)))
        largest = seen.largest.numpy().astype(np.float64)
        factors = np.where(largest > 0, np.maximum(largest, 1e-30) ** a / of_weight**b, 1.0)
        middle = np.exp(np.log(factors[largest > 0]).mean())
        wide = np.where(largest > 0, factors / middle, 1.0).repeat(window)
        flat = weight.reshape(len(weight), -1).astype(np.float64)
        smooth = flat * wide
        best, least = None, np.full(len(flat), np.inf)
        for ratio in np.linspace(0.2, 1.2, 17)[1:]:
            scale = np.abs(smooth).max(1, keepdims=True) / 7 * ratio
            tried = scale * np.clip(np.rint(smooth / scale), -8, 7)
            error = ((tried - smooth) ** 2).sum(1)
            best = tried if best is None else np.where((error < least)[:, None], tried, best)
            least = np.minimum(least, error)
        total = 0.0
        for rows in seen.rows:
            x = rows.numpy().astype(np.float64)
            tries = [np.abs(x / wide).max() / 7 * r for r in np.linspace(1 / 30, 1.05, 30)]
            codes = [s * np.clip(np.rint(x / wide / s), -7, 7) for s in tries]
            quantised = min(codes, key=lambda c: ((c - x / wide) ** 2).sum())
            total += ((quantised @ best.T - x @ flat.T) ** 2).sum()
        errors[a, b] = total
    return min(errors, key=errors.__getitem__)


def test_the_grid_equals_a_search_by_hand(inserted: Program) -> None:
    result = run_procedure(inserted, QUICK, _work(inserted))
    for site, seen in _seen(inserted, QUICK).items():
        weight = inserted.state[f"{site}.weight_smoothed"]
        a, b = _by_hand(weight.numpy(), seen)
        wanted = smoothing_factors(seen.largest, weight, a, b)
        torch.testing.assert_close(result.state[f"{site}.smoothing"].flatten(), wanted.reciprocal())
        assert (a, b) != (0.0, 0.0)


@pytest.mark.parametrize("shape", [(24, 8, 3, 3), (24, 60), (60, 24), (24, 24)])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_error_is_that_of_the_whole_computation(shape: tuple[int, ...], rank: int) -> None:
    """Whatever is computed once, or through the smaller Gram matrix: the same as by the formula, with numpy's SVD."""
    generator = torch.Generator().manual_seed(9)
    weight, channels = torch.randn(shape, generator=generator), shape[1]
    weight[:, ::7] *= 20
    gains, window = torch.ones(channels), weight[0, 0].numel()
    gains[::5] = 30.0
    rows = [torch.randn(20, channels * window, generator=generator) * gains.repeat_interleave(window) for _ in "ab"]
    largest = torch.cat(rows).view(40, channels, window).abs().amax((0, 2))
    plan = SitePlan("site", "linear", channels, shape[0], 4, 4, branch_rank=rank)
    site, wanted = _Site(plan, weight, rows, Smooth()), dict[tuple[float, float], float]()
    for pair in _pairs(39):
        factors = smoothing_factors(largest, weight, *pair)
        wanted[pair] = _whole_error(weight, rows, factors, rank)
        assert site.error(factors) == pytest.approx(wanted[pair], rel=1e-3), pair
    best = min(_pairs(39), key=lambda pair: site.error(smoothing_factors(largest, weight, *pair)))
    assert best == min(wanted, key=wanted.__getitem__)


def _whole_error(weight: Tensor, rows: list[Tensor], factors: Tensor, rank: int) -> float:
    """Nothing kept between candidates, L from the singular values of Ŵ, all but the scales in double precision."""
    wide = factors.double().repeat_interleave(weight[0, 0].numel())
    flat = weight.flatten(1).double()
    left, values, right = np.linalg.svd((flat * wide).numpy(), full_matrices=False)
    branch = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank])
    rest = (flat * wide - branch).float()
    codes = torch.ops.hqc.fake_quantize(rest, mse_weight_scale(rest, -8, 7, 16), -8, 7).double()
    total = 0.0
    for x in rows:
        scaled = x.double() / wide
        made = quantised_activation(scaled.float(), 4, "symmetric").double() @ codes.T + scaled @ branch.T
        total += float((made - x.double() @ flat.T).square().sum())
    return total


@pytest.mark.parametrize("shape", [(6, 10), (5, 10, 2, 2)])
def test_groups_are_measured_as_they_are_quantised(shape: tuple[int, ...]) -> None:
    """Group by group in numpy: scales of 4 channels of a token or pixel, of 3 channels of a weight's tap."""
    generator = torch.Generator().manual_seed(5)
    weight, rows = torch.randn(shape, generator=generator), torch.randn(20, math.prod(shape[1:]), generator=generator)
    plan = SitePlan("site", "linear", shape[1], shape[0], 4, 4)
    site = _Site(plan, weight, [rows], Smooth(activation="dynamic", activation_group=4, weight_group=3))
    factors = 0.5 + torch.rand(shape[1], generator=generator)

    def on_grid(values: Any, group: int, low: int) -> Any:
        """Of values [n, C, taps]."""
        found = np.empty_like(values)
        for start in range(0, values.shape[1], group):
            part = values[:, start : start + group]
            scale = np.abs(part).max(1, keepdims=True) / 7
            found[:, start : start + group] = scale * np.clip(np.rint(part / scale), low, 7)
        return found

    lambdas = factors.double().numpy()[None, :, None]
    flat, x = (one.double().view(len(one), shape[1], -1).numpy() for one in (weight, rows))
    made = on_grid(x / lambdas, 4, -7).reshape(20, -1) @ on_grid(flat * lambdas, 3, -8).reshape(shape[0], -1).T
    wanted = ((made - x.reshape(20, -1) @ flat.reshape(shape[0], -1).T) ** 2).sum()
    assert site.error(factors) == pytest.approx(wanted, rel=1e-3)


def test_max_ratio_needs_no_search(inserted: Program) -> None:
    result = run_procedure(inserted, Smooth(by="max_ratio", samples=2), _work(inserted))
    seen, weight = _seen(inserted, QUICK)["head"].largest, inserted.state["head.weight_smoothed"]
    ratio = (seen / weight.abs().amax(0)).sqrt()
    found = result.state["head.smoothing"].reciprocal()
    others = [i for i in range(16) if seen[i] > 0]
    torch.testing.assert_close(found[others] / found[0], ratio[others] / ratio[0])
    assert float(found[11]) == 1


def test_activation_range_gives_every_channel_one_range(inserted: Program) -> None:
    """As a scale of its own for each input channel would: δ_c/δ_ref, whatever the weight is."""
    result = run_procedure(inserted, Smooth(by="activation_range", samples=2), _work(inserted))
    for site, seen in _seen(inserted, QUICK).items():
        smooth = seen.largest * result.state[f"{site}.smoothing"].flatten()
        used = smooth[seen.largest > 0]
        torch.testing.assert_close(used, used[:1].expand_as(used))


@pytest.mark.parametrize("by", ["grid", "max_ratio", "activation_range", "timestep_range"])
def test_the_numbers_stay(inserted: Program, by: str) -> None:
    step = Smooth(by=by, samples=2, timesteps=2, rows=24)
    result, args = run_procedure(inserted, step, _work(inserted)), inserted.example_inputs(3)
    torch.testing.assert_close(result.module()(*args), inserted.module()(*args), rtol=1e-4, atol=1e-4)
    assert site_problems(result) == []
    assert result.stage == inserted.stage
    again = run_procedure(inserted, step, _work(inserted))
    assert all(torch.equal(tensor, again.state[name]) for name, tensor in result.state.items())
    # Once more, from what is folded already: the same up to the rounding of the weights.
    twice = run_procedure(result, step, _work(inserted))
    torch.testing.assert_close(twice.state["conv.smoothing"], result.state["conv.smoothing"], rtol=1e-3, atol=1e-6)


def test_timestep_ranges_equal_a_computation_by_hand(inserted: Program) -> None:
    """In numpy, from what the denoiser is given at each step: what `conv` reads is (sample + t/1000)·gains."""
    step, work = Smooth(by="timestep_range", samples=2, groups=2, limit=50.0), _work(inserted)
    gains = np.ones(16)
    gains[3], gains[7], gains[11] = 60.0, 0.05, 0.0
    module, largest = inserted.module(), []

    def denoise(sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        x = (sample.double().numpy() + float(timestep[0]) / 1000) * gains.reshape(1, -1, 1, 1)
        largest.append(np.abs(x).max(axis=(0, 2, 3)))
        return module(sample, timestep)  # type: ignore[no-any-return]

    with torch.no_grad():
        for _ in work.walk("testing", denoise, step.samples, step.seed):
            pass
    assert len(largest) == 3
    groups = [np.maximum(largest[0], largest[1]), largest[2]]  # the first groups have the steps that are left over
    sizes = [group.max() for group in groups]
    ratio = sum(size / sum(sizes) * group for size, group in zip(sizes, groups, strict=True))
    wanted = np.ones(16)
    used = ratio > 0
    wanted[used] = np.clip(ratio[used] / ratio[used].min(), 1, 50)
    found = run_procedure(inserted, step, work)
    np.testing.assert_allclose(found.state["conv.smoothing"].reciprocal().flatten(), wanted, rtol=1e-5)
    assert wanted[3] == 50
    assert wanted[7] == 1
    assert wanted[11] == 1
    assert 10 < wanted[0] < 50
    one = timestep_range_factors(torch.tensor([[1.0, 2.0], [6.0, 3.0]]), groups=9, limit=1.5)
    torch.testing.assert_close(one, torch.tensor([1.5, 1.0]))  # (1·2 + 6·6)/8 and (2·2 + 3·6)/8


def test_timestep_ranges_lower_the_error_of_the_output(inserted: Program) -> None:
    smooth = run_procedure(inserted, Smooth(by="timestep_range", samples=2, limit=1024.0), _work(inserted))
    assert _error(smooth) < 0.7 * _error(inserted)


def _error(program: Program) -> float:
    """Of w4a4 with calibrated scales, along the trajectory's inputs."""
    rest = [InsertQdq((999.0, 500.0, 0.0))]
    quantised = run_pipeline(program, rest)
    for step in (CalibrateWeights(), CalibrateActivations(samples=4, candidates=30)):
        quantised = run_procedure(quantised, step, _work(program))
    args = program.example_inputs(16, seed=7)
    wanted = program.module()(*args)
    return float((quantised.module()(*args) - wanted).norm() / wanted.norm())


def test_the_error_of_the_output_falls(inserted: Program) -> None:
    smooth = run_procedure(inserted, QUICK, _work(inserted))
    assert _error(smooth) < 0.7 * _error(inserted)


@pytest.mark.parametrize("weights", [False, True])
def test_rotations_follow(inserted: Program, weights: bool) -> None:
    smooth = run_procedure(inserted, QUICK, _work(inserted))
    rotated = run_pass(smooth, InsertHadamard(16, kind="regular", weights=weights))
    args = inserted.example_inputs(3)
    torch.testing.assert_close(rotated.module()(*args), inserted.module()(*args), rtol=1e-3, atol=1e-3)
    assert _error(rotated) < _error(inserted)
    chosen = run_procedure(smooth, ChooseRotation(samples=1, timesteps=1), _work(inserted))
    assert site_problems(chosen) == []


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(inserted: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PipelineTextError, match="option by is 'magic'"):
        Smooth(by="magic")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="there is nothing to sample"):
        Smooth().check(inserted, Work(inserted, observe=lambda denoise: None))
    broken = {**inserted.state, "conv.weight_smoothed": torch.full((16, 16, 3, 3), torch.nan)}
    with pytest.raises(TrainingError, match="what head reads: met NaN or infinity at timestep"):
        run_procedure(inserted.evolve(state=broken), QUICK, _work(inserted))
    monkeypatch.setattr("hqc.memory.available_bytes", lambda: 10**6)
    QUICK.check(inserted, _work(inserted))
    with pytest.raises(MemoryShortError, match=r"smoothing by 2 images: .* Take fewer rows"):
        Smooth(samples=2, rows=4096).check(inserted, _work(inserted))
