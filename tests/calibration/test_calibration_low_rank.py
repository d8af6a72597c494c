"""Decomposition: turns against numpy's SVD, a planted low-rank part, rotations, the float function, refusals."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hqc.calibration import CalibrateWeights, Decompose
from hqc.calibration.low_rank import gram_of_columns, low_rank
from hqc.calibration.site_rows import SiteRows, collect
from hqc.calibration.weights import mse_weight_scale
from hqc.capture import trace
from hqc.capture.sources import Source
from hqc.errors import MemoryShortError, TrainingError
from hqc.export.reference import without_quantisers
from hqc.passes import AttachBranch, InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import Pass, run_pass, run_pipeline, run_procedure
from hqc.program import InputSpec, Origin, Program
from hqc.sampling import Sampler, Work, synthetic_task
from hqc.sites import source_of
from hqc.structure import site_problems

QUICK = Decompose(samples=2, timesteps=2, rows=40)


class _Planted(nn.Module):
    """Weights with a large part of rank 2 that codes would spend their range on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 16)
        for layer in (self.conv, self.head):
            flat = layer.weight.data.flatten(1)
            outliers = torch.zeros(2, flat.shape[1])
            outliers[0, 5], outliers[1, ::7] = 8.0, 2.0
            layer.weight.data += (torch.randn(16, 2) @ outliers).view(layer.weight.shape)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = torch.tanh(self.conv(sample + (timestep / 1000).view(-1, 1, 1, 1)) / 30)
        return self.head(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape)


@pytest.fixture(scope="module")
def captured_program() -> Program:
    torch.manual_seed(3)
    inputs = (InputSpec("sample", ("N", 16, 4, 4)), InputSpec("timestep", ("N",)))
    return trace(Source(_Planted(), inputs, Origin(source="planted")))


def _attached(program: Program, *rotation: Pass, rank: int = 3, kind: str = "symmetric") -> Program:
    insert = InsertQdq((0.0, 500.0), weight=kind)  # type: ignore[arg-type]
    return run_pipeline(program, [SelectLayers(bits="w4a4"), AttachBranch(rank), *rotation, insert])


def _work(program: Program) -> Work:
    return Work(program, synthetic_task(program), Sampler(3, 1.0, 0.0))


def _seen(program: Program, step: Decompose) -> dict[str, SiteRows]:
    inputs = {site: source_of(layer, through_smoothing=False) for site, layer in program.sites()}
    options = {"samples": step.samples, "timesteps": step.timesteps, "rows": step.rows, "seed": step.seed}
    return collect(program, inputs, _work(program), "testing", **options)


# ---- the turns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_low_rank_is_numpys(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    up, down = low_rank(matrix, 3)
    left, values, right = np.linalg.svd(matrix.numpy().astype(np.float64))
    wanted = left[:, :3] @ np.diag(values[:3]) @ right[:3]
    np.testing.assert_allclose((up @ down).numpy(), wanted, atol=1e-5)
    assert (up.shape, down.shape) == ((shape[0], 3), (3, shape[1]))
    zero_up, zero_down = low_rank(torch.zeros(shape), 2)
    assert not bool((zero_up @ zero_down).any())


@pytest.mark.parametrize("shape", [(500, 7), (500, 450), (400, 410)])
def test_low_rank_of_many_rows_and_of_a_gram_matrix_that_is_known(shape: tuple[int, int]) -> None:
    """More rows than a band of the Gram matrix; outliers, so that singular values lie far apart."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    matrix[:, ::3] *= 50
    left, values, right = np.linalg.svd(matrix.numpy().astype(np.float64), full_matrices=False)
    wanted = torch.from_numpy((left[:, :5] * values[:5]) @ right[:5])
    for gram in (None, gram_of_columns(matrix)):
        up, down = low_rank(matrix, 5, gram)
        assert float((up.double() @ down.double() - wanted).norm() / wanted.norm()) < 1e-5
    assert low_rank(torch.ones(2, 3), 5)[0].shape == (2, 2)


def _turns(weight: np.ndarray, rows: np.ndarray, rank: int, rounds: int) -> tuple[list[float], np.ndarray, np.ndarray]:
    """The error of every turn, up to the first that is not better; L and q of the best one. In numpy."""
    codes, errors, best = np.zeros_like(weight), list[float](), (weight, weight)
    energy = ((rows @ weight.T) ** 2).sum()
    for _ in range(rounds):
        left, values, right = np.linalg.svd(weight - codes, full_matrices=False)
        branch = (left[:, :rank] * values[:rank]) @ right[:rank]
        residual = weight - branch
        scales = mse_weight_scale(torch.from_numpy(residual).float(), -8, 7).double().numpy()[:, None]
        codes = scales * np.clip(np.rint(residual / scales), -8, 7)
        errors.append(float(((rows @ (codes + branch - weight).T) ** 2).sum() / energy))
        if errors[-1] > min(errors):
            return errors, *best
        best = (branch, codes)
    return errors, *best


@pytest.mark.parametrize("site", ["conv", "head"])
@pytest.mark.parametrize("rounds", [1, 3, 100])
def test_the_turns_are_those_of_numpy(captured_program: Program, site: str, rounds: int) -> None:
    program = _attached(captured_program)
    step = replace(QUICK, rounds=rounds)
    result = run_procedure(program, step, _work(program))
    weight = captured_program.state[f"{site}.weight"].flatten(1).double().numpy()
    rows = torch.cat(_seen(program, step)[site].rows).double().numpy()
    errors, branch, codes = _turns(weight, rows, 3, rounds)
    state = result.state
    found = (state[f"{site}.branch_up"].flatten(1) @ state[f"{site}.branch_down"].flatten(1)).double().numpy()
    np.testing.assert_allclose(found, branch, atol=2e-4 * np.abs(weight).max())
    residual, scale = state[f"{site}.weight_residual"], state[f"{site}.weight_scale"]
    own = torch.ops.hqc.fake_quantize(residual, scale, -8, 7).flatten(1).double().numpy()
    np.testing.assert_allclose(own, codes, atol=2e-4 * np.abs(weight).max())
    kept = len(errors) if errors[-1] == min(errors) else len(errors) - 1
    said = f"branch of rank 3: weight error {100 * min(errors) ** 0.5:.2g} % after {kept} rounds"
    assert said in result.plan[site].reason
    if rounds == 100:
        assert 1 < kept < 100, "the planted part takes more than one turn, and the turns end by themselves"
        assert min(errors) < errors[0]


def test_the_planted_part_goes_into_the_branch(captured_program: Program) -> None:
    """The residual's range, and with it the error of its codes, shrinks."""
    args = captured_program.example_inputs(8, seed=5)
    wanted = captured_program.module()(*args)
    errors = []
    for chain in (_plain(captured_program), run_procedure(*_prepared(captured_program))):
        quantised = _weights_alone(chain)
        errors.append(float((quantised.module()(*args) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.4 * errors[0], errors


def _prepared(program: Program) -> tuple[Program, Decompose, Work]:
    attached = _attached(program)
    return attached, QUICK, _work(attached)


def _plain(program: Program) -> Program:
    quantised = run_pipeline(program, [SelectLayers(bits="w4a4"), InsertQdq((0.0, 500.0))])
    return run_procedure(quantised, CalibrateWeights(), _work(quantised))


def _weights_alone(program: Program) -> Program:
    """With scales of activations so fine that only weights are rounded; their codes reach as far as is needed."""
    graph = program.module().graph
    for node in graph.nodes:
        if node.meta.get("role") == "activation_quantizer":
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return program.evolve(graph=graph, state={n: t for n, t in program.state.items() if n in used})


ROTATIONS: Sequence[tuple[Pass, ...]] = (
    (),
    (InsertHadamard(16, kind="regular"),),
    (InsertHadamard(16, kind="regular", weights=True),),
)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "mixed"])
@pytest.mark.parametrize("rotation", ROTATIONS, ids=["unrotated", "single", "double"])
def test_the_float_function_stays(captured_program: Program, rotation: tuple[Pass, ...], kind: str) -> None:
    """R + L is the weight, in whatever basis R is stored; and the error that is left is small."""
    program = _attached(captured_program, *rotation, kind=kind)
    result = run_procedure(program, QUICK, _work(program))
    args = program.example_inputs(3)
    wanted = captured_program.module()(*args)
    torch.testing.assert_close(without_quantisers(result).module()(*args), wanted, rtol=1e-3, atol=1e-3)
    assert site_problems(result) == []
    found = _weights_alone(result).module()(*args)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    # Again from what is split already: the same weight, so the same split.
    again = run_procedure(result, QUICK, _work(program))
    torch.testing.assert_close(again.state["head.weight_scale"], result.state["head.weight_scale"], rtol=1e-2, atol=0)


def test_calibrating_weights_afterwards_changes_nothing(captured_program: Program) -> None:
    program = _attached(captured_program)
    result = run_procedure(program, QUICK, _work(program))
    again = run_procedure(result, CalibrateWeights(), _work(program))
    assert torch.equal(again.state["conv.weight_scale"], result.state["conv.weight_scale"])


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(captured_program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _attached(captured_program)
    with pytest.raises(TrainingError, match="there is nothing to sample"):
        QUICK.check(program, Work(program, observe=lambda denoise: None))
    monkeypatch.setattr("hqc.memory.available_bytes", lambda: 10**6)
    QUICK.check(program, _work(program))
    with pytest.raises(MemoryShortError, match=r"decomposing by 2 images: .* Take fewer rows"):
        replace(QUICK, rows=4096).check(run_pass(captured_program, SelectLayers()), _work(program))
