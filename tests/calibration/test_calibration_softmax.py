"""Which quantiser a softmax has: likelihoods against scipy's, samples of known distributions, tables along a run."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from attention_models import Attending, attending
from scipy import stats
from torch import Tensor

from hqc.calibration import CalibrateActivations, CalibrateWeights, ChooseSoftmax
from hqc.calibration.searches import activation_search, some_values
from hqc.calibration.softmax import Tail
from hqc.errors import MemoryShortError, PlanError, TrainingError
from hqc.passes import InsertAttentionQdq, InsertQdq, OpenAttention, SelectLayers
from hqc.pipeline import run_pipeline, run_procedure
from hqc.program import Program
from hqc.recipes.recipe import Recipe
from hqc.sampling import Sampler, Work, synthetic_task

STEP = 0.01


def tail_of(p: np.ndarray) -> Tail:
    tail = Tail()
    for part in np.array_split(p, 3):
        tail.add(torch.from_numpy(part), STEP)
    return tail


@pytest.mark.parametrize("seed", range(4))
def test_the_ratio_is_that_of_scipys_likelihoods(seed: int) -> None:
    """Both fitted by scipy to what lies above half a step."""
    p = np.random.default_rng(seed).beta(0.4, 3, 500)
    u = p[p >= STEP / 2] / (STEP / 2)
    shape, _, _ = stats.pareto.fit(u, floc=0, fscale=1)
    _, spread = stats.expon.fit(u, floc=1)
    wanted = stats.pareto.logpdf(u, shape).sum() - stats.expon.logpdf(u, 1, spread).sum()
    assert tail_of(p).ratio == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_known_distributions_are_told_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    power = STEP / 2 * (1 + rng.pareto(0.8, 300))
    exponential = STEP / 2 * (1 + rng.exponential(20, 300))
    assert tail_of(power).ratio > 0
    assert tail_of(exponential).ratio < 0
    # What even steps would round to nothing takes no part.
    assert tail_of(np.concatenate([power, STEP / 3 * rng.random(500)])).ratio == pytest.approx(tail_of(power).ratio)


def test_even_probabilities_take_even_steps_and_peaks_powers_of_two() -> None:
    generator = torch.Generator().manual_seed(3)
    for spread, powers in ((0.05, False), (0.3, False), (2.0, True), (3.0, True)):
        p = (spread * torch.randn(200, 64, generator=generator)).softmax(-1)
        search = activation_search(4, symmetric=False, count=40)
        search.add(some_values(p), 0.0, float(p.max()))
        assert search.zero == 0
        tail = Tail()
        tail.add(p, search.scale)
        assert (tail.ratio > 0) == powers, spread


def test_without_a_tail_steps_are_even() -> None:
    tail = Tail()
    assert tail.ratio == 0
    tail.add(torch.full((5,), STEP / 2), STEP)
    assert tail.ratio == 0


def _inserted(program: Program, grid: tuple[float, ...] = (999.0, 0.0)) -> Program:
    return run_pipeline(program, [OpenAttention(), SelectLayers(), InsertQdq(grid, static=True), InsertAttentionQdq(4)])


def _work(program: Program) -> Work:
    return Work(program, synthetic_task(program), Sampler(3, 1.0, 0.0))


def _probabilities(program: Program, work: Work, samples: int, seed: int) -> dict[float, Tensor]:
    """By timestep, from torch's own layers."""
    module, found = program.module(), dict[float, Tensor]()

    def denoise(sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        x = sample + timestep.view(-1, 1, 1) / 1000
        q, k = (
            torch.nn.functional.linear(x, program.state[f"{n}.weight"], program.state[f"{n}.bias"])
            .unflatten(-1, (2, -1))
            .transpose(1, 2)
            for n in ("to_q", "to_k")
        )
        found[float(timestep[0])] = (6 * q @ k.transpose(-1, -2) / 4).softmax(-1)
        return module(sample, timestep)  # type: ignore[no-any-return]

    with torch.no_grad():
        for _ in work.walk("testing", denoise, samples, seed):
            pass
    return found


def test_scales_and_kinds_are_of_each_timestep() -> None:
    program = attending(lambda: Attending(spread=6.0), tokens=64)
    work = _work(program)
    grid = tuple(float(t) for t in work.sampled.scheduler(3).timesteps)
    started = run_procedure(_inserted(program, grid=grid), CalibrateWeights(), work)
    step = CalibrateActivations(samples=3, candidates=30)
    calibrated = run_procedure(started, step, work)
    (name,) = (n.removesuffix(".log2_table") for n in calibrated.state if n.endswith(".log2_table"))
    seen = _probabilities(program, work, 3, step.seed)
    wanted, kinds = [], []
    for timestep in grid:
        p = seen[timestep]
        search = activation_search(4, symmetric=False, count=30)
        search.add(some_values(p), 0.0, float(p.max()))
        wanted.append(search.scale)
        u = p.double().numpy().ravel() / (search.scale / 2)
        u = u[u >= 1]
        shape, mean = len(u) / np.log(u).sum(), (u - 1).mean()
        kinds.append(stats.pareto.logpdf(u, shape).sum() > stats.expon.logpdf(u, 1, mean).sum())
    torch.testing.assert_close(calibrated.state[f"{name}.activation_scale_table"], torch.tensor(wanted))
    chosen = run_procedure(calibrated, ChooseSoftmax(samples=3), work)
    assert chosen.state[f"{name}.log2_table"].tolist() == [float(kind) for kind in kinds]
    assert any(kinds)
    assert chosen.history[-1].touched == (name.removesuffix(".attention_softmax"),)
    assert {n for n, t in chosen.state.items() if not torch.equal(t, calibrated.state[n])} == {f"{name}.log2_table"}


def test_nothing_to_choose(captured: Callable[[str], Program]) -> None:
    program = _inserted(captured("without_attention"))

    def never(*_: object) -> None:
        raise AssertionError("nothing is sampled")

    found = run_procedure(program, ChooseSoftmax(), Work(program, observe=never))
    assert found.state == program.state


def test_memory_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _inserted(attending())
    ChooseSoftmax(samples=2).check(program, _work(attending()))
    monkeypatch.setattr("hqc.memory.available_bytes", lambda: 12_345)
    said = r"choosing quantisers on 2 images: needs about .* and 12\.3 kB are available\. "
    with pytest.raises(MemoryShortError, match=said + r"Take fewer \(--set choose_softmax\.samples=2\)"):
        ChooseSoftmax(samples=2).check(program, _work(attending()))
    ChooseSoftmax(samples=2).check(program, Work(program, observe=lambda denoise: None))  # whoever observes, decides


def test_refusals() -> None:
    program = attending()
    inserted = _inserted(program)
    with pytest.raises(TrainingError, match="the forward loop never called the model"):
        run_procedure(inserted, ChooseSoftmax(), Work(program, observe=lambda denoise: None))
    broken = inserted.evolve(state={**inserted.state, "to_q.weight": torch.full((32, 32), torch.nan)})
    with pytest.raises(TrainingError, match=r"choosing quantisers at .*attention_softmax: met NaN or infinity"):
        run_procedure(broken, ChooseSoftmax(samples=1), _work(program))
    own = (OpenAttention(), SelectLayers(), InsertQdq(), InsertAttentionQdq(), ChooseSoftmax())
    with pytest.raises(PlanError, match="comes before calibrate_activations, which it needs"):
        Recipe("x", "", (*own, CalibrateActivations()))
    with pytest.raises(PlanError, match="leaves attention written out that no insert_attention_qdq fills"):
        Recipe("x", "", (OpenAttention(), SelectLayers(), InsertQdq(), CalibrateActivations()))
