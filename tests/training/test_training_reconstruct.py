"""Reconstruction: its inputs, what it learns, against plain torch, what it leaves alone, resumed, refused."""

import re
from dataclasses import replace
from typing import Any

import pytest
import reconstructed
import torch
from torch import Tensor, fx, nn

from hqc.checkpoint import Checkpoint
from hqc.errors import ArtefactError, MemoryShortError, PlanError, TrainingError
from hqc.evaluation.comparison.budget import iterates
from hqc.passes import AttachLora
from hqc.pipeline import run_pass, run_procedure
from hqc.program import Program
from hqc.recipes.recipe import Recipe
from hqc.sampling import Update
from hqc.sampling.sample_set import SampleSet, collect_samples, set_size
from hqc.training import Reconstruct
from hqc.training.frontier import Frontier
from hqc.training.trajectories import generator
from hqc.units import units_of

STEP = Reconstruct(samples=4, timesteps=4, iterations=60, batch_size=8, rate=5e-2)
SCALES = replace(STEP, learn="activation_scales", rate=3e-2)
UNITS = ["conv_in", "resnets.0", "token", "resnets.1", "twice", "twice@2", "conv_out"]


@pytest.fixture(scope="module")
def selected() -> Program:
    return reconstructed.unquantised(reconstructed.captured())


@pytest.fixture(scope="module")
def student(selected: Program) -> Program:
    return reconstructed.quantised(selected)


@pytest.fixture(scope="module")
def samples(selected: Program) -> SampleSet:
    return collect_samples(reconstructed.work(selected), 4, 4, STEP.seed, "collecting")


@pytest.fixture(scope="module")
def rounded(selected: Program, student: Program) -> Program:
    return run_procedure(student, STEP, reconstructed.work(selected))


@pytest.fixture(scope="module")
def scaled(selected: Program, rounded: Program) -> Program:
    return run_procedure(rounded, SCALES, reconstructed.work(selected))


def changed(before: Program, after: Program) -> set[str]:
    assert before.state.keys() == after.state.keys()
    return {name for name, tensor in after.state.items() if not torch.equal(tensor, before.state[name])}


def with_float_activations(program: Program) -> nn.Module:
    module = program.module()
    for node in list(module.graph.nodes):
        if node.meta.get("role") == "activation_quantizer":
            node.replace_all_uses_with(node.args[0])
    module.recompile()
    return module


@torch.no_grad()
def error(module: nn.Module, teacher: Program, seed: int = 77) -> float:
    """On samples of another seed."""
    held_out = collect_samples(reconstructed.work(teacher), 8, 4, seed, "held out").inputs
    wanted = teacher.module()(*held_out)
    return float((module(*held_out) - wanted).norm() / wanted.norm())


# ---- the frontier ----------------------------------------------------------------------------------------------------


class Values(fx.Interpreter):
    """The value of every node, from the start."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module(), garbage_collect_values=False)

    @torch.no_grad()
    def of(self, args: tuple[Tensor, ...]) -> dict[str, Any]:
        self.run(*args)
        return {node.name: value for node, value in self.env.items()}


def test_the_frontier_has_the_values_of_a_run_from_the_start(selected: Program, samples: SampleSet) -> None:
    """To the bit, with the same number of rows at once, and after every unit's weights have changed."""
    state = dict(selected.state)
    frontier = Frontier(selected, samples, state, rows=8)
    for unit in units_of(selected):
        frontier.behind(unit.inputs[-1])
        runs = [Values(selected.evolve(state=dict(state))).of(chunk) for chunk in samples.chunks(8)]
        for name in unit.inputs:
            assert torch.equal(frontier.value(name), torch.cat([run[name] for run in runs])), (unit.name, name)
        for site in unit.sites:
            weight = f"{site.partition('@')[0]}.weight"
            state[weight] = state[weight] * 1.1 if site != "twice@2" else state[weight]


def test_the_frontier_keeps_what_is_still_read(selected: Program, samples: SampleSet) -> None:
    frontier = Frontier(selected, samples, selected.state, rows=8)
    frontier.behind(units_of(selected)[-1].output)
    kept = {node.name for chunk in frontier._chunks for node in chunk}
    assert kept == {*(spec.name for spec in selected.inputs), units_of(selected)[-1].output}


# ---- rounding --------------------------------------------------------------------------------------------------------


def test_rounding_lowers_the_error_of_the_weights(selected: Program, student: Program, rounded: Program) -> None:
    before, after = (error(with_float_activations(one), selected) for one in (student, rounded))
    assert after < 0.9 * before


def test_only_weights_change_those_of_both_parts_too(student: Program, rounded: Program) -> None:
    weights = {f"{plan.site}.weight" for plan in student.plan.quantised}
    assert changed(student, rounded) <= weights
    assert {"resnets.1.conv_shortcut:0.weight", "resnets.1.conv_shortcut:1.weight"} <= changed(student, rounded)
    assert "twice.weight" not in changed(student, rounded)  # two layers read it


@pytest.mark.parametrize("ranges", ["symmetric", "asymmetric"])
def test_the_quantisers_of_the_program_give_the_codes(selected: Program, ranges: str) -> None:
    """Every learnt weight is on its grid, to the bit, and at most one code from where it was."""
    student = reconstructed.quantised(selected, ranges)
    found = run_procedure(student, replace(STEP, iterations=20), reconstructed.work(selected))
    before, after = (Values(one).of(one.example_inputs(1)) for one in (student, found))
    moved = 0
    for site, layer in found.sites():
        node, scale = layer.args[1].name, found.state[f"{site}.weight_scale"]
        if f"{site}.weight" not in changed(student, found):
            continue
        assert torch.equal(after[node], found.state[f"{site}.weight"]), site
        levels = ((after[node] - before[node]) / scale.view(-1, *[1] * (after[node].ndim - 1))).round()
        assert float(levels.abs().max()) <= 1, site
        moved += int(levels.count_nonzero())
    assert moved > 20


def test_one_layer_equals_plain_torch(selected: Program, student: Program, samples: SampleSet) -> None:
    """AdaRound of `conv_in` in a few lines: the same codes."""
    weight, scale = selected.state["conv_in.weight"], student.state["conv_in.weight_scale"].view(-1, 1, 1, 1)
    low, high = (-4, 3) if student.plan["conv_in"].weight_bits == 3 else (-128, 127)
    x, bias = samples.inputs[0], selected.state["conv_in.bias"]
    below = torch.floor(weight * (1 / scale))
    alpha = torch.logit(((weight * (1 / scale) - below) + 0.1) / 1.2).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=STEP.rate)
    for step in range(STEP.iterations):
        rows = torch.randperm(len(x), generator=generator(STEP.seed, 0, step))[: STEP.batch_size]
        h = (1.2 * alpha.sigmoid() - 0.1).clip(0, 1)
        w = scale * (below + h).clip(low, high)
        found, wanted = (torch.conv2d(x[rows], one, bias, padding=1) for one in (w, weight))
        loss = (found - wanted).pow(2).sum(1).mean()
        done = step / STEP.iterations
        if done >= 0.2:
            beta = 2 + 18 * (1 - (done - 0.2) / 0.8)
            loss = loss + 0.01 * (1 - (2 * h - 1).abs().pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wanted = scale * (below + (alpha > 0)).clip(low, high)  # h > 1/2
    # The learnt codes are kept where they are better than the nearest ones on the samples.
    errors = [
        float((torch.conv2d(x, one, bias, padding=1) - torch.conv2d(x, weight, bias, padding=1)).square().sum())
        for one in (wanted, scale * (weight / scale).round().clip(low, high))
    ]
    learnt = run_procedure(student, STEP, reconstructed.work(selected)).state["conv_in.weight"]
    expected = wanted if errors[0] < errors[1] else weight
    assert torch.equal(learnt, expected.detach())


def test_a_unit_that_gains_nothing_keeps_what_it_had(selected: Program, student: Program) -> None:
    """At a rate that throws every code about."""
    found = run_procedure(student, replace(STEP, rate=50.0, iterations=5), reconstructed.work(selected))
    before, after = (error(with_float_activations(one), selected) for one in (student, found))
    assert after <= before * 1.05


# ---- scales ----------------------------------------------------------------------------------------------------------


def test_scales_that_are_too_large_are_repaired(selected: Program, rounded: Program) -> None:
    """Those of the search are near the best for their tensor; twice as large they are not."""
    tables = {name: 2 * t for name, t in rounded.state.items() if name.endswith("scale_table")}
    spoilt = rounded.evolve(state={**rounded.state, **tables})
    found = run_procedure(spoilt, replace(SCALES, iterations=100), reconstructed.work(selected))
    assert error(found.module(), selected) < 0.7 * error(spoilt.module(), selected)
    assert all(float(found.state[name]) < float(table) for name, table in tables.items() if "resnets" in name)


def test_only_scales_change_and_stay_positive(rounded: Program, scaled: Program) -> None:
    names = changed(rounded, scaled)
    assert names
    assert all(name.endswith(".activation_scale_table") for name in names)
    assert all(float(scaled.state[name].min()) > 0 for name in names)
    wild = replace(SCALES, rate=100.0, iterations=5)
    work = reconstructed.work(reconstructed.unquantised(reconstructed.captured()))
    assert all(float(t.min()) > 0 for n, t in run_procedure(rounded, wild, work).state.items() if "scale" in n)


# ---- going on after a kill -------------------------------------------------------------------------------------------


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("step", [STEP, SCALES], ids=["rounding", "activation scales"])
@pytest.mark.parametrize("after", [1, 3, 6])
def test_it_resumes_to_the_same_bits(selected: Program, student: Program, step: Reconstruct, after: int) -> None:
    step = replace(step, iterations=20)
    told: list[Update] = []
    whole = run_procedure(student, step, reconstructed.work(selected, on_update=told.append))
    saved: list[Checkpoint] = []

    def stop(update: Update) -> None:
        if update.step > after * 20:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        run_procedure(student, step, reconstructed.work(selected, on_update=stop, on_checkpoint=saved.append))
    assert saved[-1].step == after * 20
    rest: list[Update] = []
    work = reconstructed.work(selected, checkpoint=saved[-1], on_update=rest.append)
    found = run_procedure(student, step, work)
    assert changed(whole, found) == set()
    assert changed(student, found)
    assert [(u.step, u.loss) for u in rest] == [(u.step, u.loss) for u in told if u.step > after * 20]


def test_a_checkpoint_of_another_program_is_refused(selected: Program, student: Program) -> None:
    for tensors in ({"codes/other": torch.zeros(3, dtype=torch.int8)}, {"codes/conv_in": torch.zeros(8, 1)}):
        work = reconstructed.work(selected, checkpoint=Checkpoint(60, tensors))
        with pytest.raises(ArtefactError, match=r"checkpoint: has .*, which this program lacks. Start again"):
            run_procedure(student, STEP, work)


# ---- progress, cost, refusals ----------------------------------------------------------------------------------------


def test_updates_count_all_units(selected: Program, student: Program) -> None:
    told: list[Update] = []
    step = replace(STEP, updates=7 * 25, iterations=60)
    run_procedure(student, step, reconstructed.work(selected, on_update=told.append))
    assert [unit.name for unit in units_of(selected)] == UNITS
    assert step.total(reconstructed.work(selected)) == 7 * 25
    assert {u.total for u in told} == {7 * 25}
    # `twice` learns nothing: two layers share its weight.
    assert [u.epoch for u in told] == [0, 0, 1, 1, 2, 2, 3, 3, 6, 6]
    assert [u.step for u in told][:4] == [20, 25, 45, 50]


def test_it_costs_what_it_runs(selected: Program) -> None:
    work = reconstructed.work(selected)
    assert iterates(Recipe("x", "", _steps()))
    collected, kept = 4 * 2 * 4, set_size(work, 4, 4)
    assert STEP.cost(selected, work) == collected + 2 * kept + 60 * 8 * 3
    assert STEP.total(work) == 60 * len(UNITS)
    assert replace(STEP, updates=3 * len(UNITS)).cost(selected, work) == collected + 2 * kept + 3 * 8 * 3
    assert replace(STEP, updates=1).total(work) == len(UNITS)


def _steps() -> tuple[Any, ...]:
    from hqc.recipes.q_diffusion import Q_DIFFUSION

    return Q_DIFFUSION.steps


def test_nan_names_the_unit_and_the_step(selected: Program, student: Program) -> None:
    bad = {**student.state, "resnets.0.conv2.bias": torch.full((8,), torch.nan)}
    with pytest.raises(TrainingError, match=r"reconstructing resnets.0, step 1: the loss is nan. Lower"):
        run_procedure(student.evolve(state=bad), STEP, reconstructed.work(selected))


def test_a_lora_is_refused(selected: Program, student: Program) -> None:
    with_lora = run_pass(student, AttachLora(rank=2))
    found = r"reconstruct: site \S+ has a LoRA. Put attach_lora behind"
    with pytest.raises(PlanError, match=found):
        run_procedure(with_lora, STEP, reconstructed.work(selected))


def test_memory_is_asked_first(selected: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hqc.memory.available_bytes", lambda: 1000)
    with pytest.raises(MemoryShortError) as caught:
        STEP.check(selected, reconstructed.work(selected))
    said = r"reconstructing on 32 samples: needs about .*Take fewer \(--set reconstruct.samples=4 or"
    assert re.search(said, str(caught.value))


# ---- rounds ----------------------------------------------------------------------------------------------------------


ROUNDS = replace(STEP, iterations=12, rounds=3, samples_from="student")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Program | None, SampleSet]]:
    """What samples were collected, and whose they are; None: the teacher's."""
    found: list[tuple[Program | None, SampleSet]] = []

    def collect(work: Any, images: int, timesteps: int, seed: int, what: str, program: Any = None) -> SampleSet:
        samples = collect_samples(work, images, timesteps, seed, what, program)
        found.append((program, samples))
        return samples

    monkeypatch.setattr("hqc.training.reconstruct.collect_samples", collect)
    return found


@pytest.mark.parametrize("learn", ["rounding", "activation_scales"])
def test_later_rounds_see_the_students_own_trajectory(
    selected: Program, student: Program, drawn: list[tuple[Program | None, SampleSet]], learn: str
) -> None:
    """Each is what the program, as the rounds before left it, is given when it samples by itself."""
    step = replace(ROUNDS, learn=learn, iterations=30)
    run_procedure(student, step, reconstructed.work(selected))
    sources = [source for source, _ in drawn]
    assert [source is None for source in sources] == [True, False, False]
    for number, (source, samples) in enumerate(drawn):
        seen: dict[float, Tensor] = {}
        module = (source or selected).module()

        def denoise(x: Tensor, t: Tensor, c: Tensor, module: Any = module, seen: Any = seen) -> Tensor:
            seen[float(t[0])] = x
            return module(x, t, c)  # type: ignore[no-any-return]

        work = reconstructed.work(selected)
        with torch.no_grad():
            for _ in work.walk("testing", denoise, step.samples, step.seed + number):
                pass
        torch.testing.assert_close(samples.inputs[0], torch.cat(list(seen.values())))
    for before, number in ((student, 1), (sources[1], 2)):
        assert before is not None
        assert changed(before, sources[number])  # type: ignore[arg-type]
    one = replace(step, rounds=1)
    assert changed(run_procedure(student, one, reconstructed.work(selected)), sources[1]) == set()  # type: ignore[arg-type]


def test_rounds_of_the_teacher_draw_other_samples(
    selected: Program, student: Program, drawn: list[tuple[Program | None, SampleSet]]
) -> None:
    run_procedure(student, replace(ROUNDS, iterations=1, samples_from="teacher"), reconstructed.work(selected))
    assert [source for source, _ in drawn] == [None] * 3
    first, second, third = (samples.inputs[0] for _, samples in drawn)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize("learn", ["rounding", "activation_scales"])
@pytest.mark.parametrize("after", [3, 7, 9, 14, 20])
def test_rounds_resume_to_the_same_bits(selected: Program, student: Program, learn: str, after: int) -> None:
    """Within a round its samples are drawn again from what had been learnt when it began."""
    step = replace(ROUNDS, learn=learn)
    saved: list[Checkpoint] = []
    whole = run_procedure(student, step, reconstructed.work(selected, on_checkpoint=saved.append))
    assert len(saved) == 3 * len(UNITS) - 1
    assert saved[after - 1].step == after * 12
    told: list[Update] = []
    work = reconstructed.work(selected, checkpoint=saved[after - 1], on_update=told.append)
    found = run_procedure(student, step, work)
    assert changed(whole, found) == set()
    assert all(update.step > after * 12 for update in told)


def test_rounds_count_and_cost(selected: Program) -> None:
    work = reconstructed.work(selected)
    assert ROUNDS.total(work) == 3 * 12 * len(UNITS)
    assert ROUNDS.cost(selected, work) == 3 * replace(ROUNDS, rounds=1).cost(selected, work)
    assert replace(ROUNDS, updates=3 * 5 * len(UNITS)).total(work) == 3 * 5 * len(UNITS)


def test_a_round_keeps_what_it_cannot_better(selected: Program, rounded: Program, student: Program) -> None:
    """Rounding goes on from the codes of the round before, not from rounding to nearest."""
    step = replace(STEP, rounds=2)
    found = run_procedure(student, step, reconstructed.work(selected))
    nearest, learnt, again = (
        {name: (t / one.state[name.replace(".weight", ".weight_scale")].view(-1, 1, 1, 1)).round() for name, t in ws}
        for one, ws in ((one, _convolutions(one)) for one in (student, rounded, found))
    )
    kept = sum(int((again[name] == learnt[name]).sum()) for name in learnt)
    as_nearest = sum(int((again[name] == nearest[name]).sum()) for name in learnt)
    assert kept > as_nearest
    assert error(with_float_activations(found), selected) < 1.05 * error(with_float_activations(rounded), selected)


def _convolutions(program: Program) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in program.state.items() if n.endswith(("conv1.weight", "conv2.weight"))]


def test_a_students_samples_need_its_scales() -> None:
    from hqc.calibration import CalibrateActivations, CalibrateWeights
    from hqc.passes import InsertQdq, SelectLayers

    steps = (SelectLayers(), InsertQdq(), CalibrateWeights(), ROUNDS, CalibrateActivations())
    with pytest.raises(PlanError, match=r"samples with scales that nothing has filled\. Put calibrate_activations in"):
        Recipe("x", "", steps)
