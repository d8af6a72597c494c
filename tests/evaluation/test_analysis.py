"""Analysis of tiny programs against numpy, and sensitivity against programs in which one site is quantised."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import Tensor, fx

from hqc import api
from hqc.errors import EvaluationError, TrainingError
from hqc.evaluation.analysis import SiteAnalysis, analyse, with_scales
from hqc.evaluation.analysis_report import CSV_COLUMNS, Report, csv_text, report_data, summary
from hqc.evaluation.analysis_run import measure, planned_program
from hqc.evaluation.inputs import FixedInputs, Sampler, fixed_inputs
from hqc.evaluation.sensitivity import SensitivityProbe
from hqc.evaluation.stepping import Run, float_program
from hqc.passes import FreezeIntegers, InsertHadamard, InsertQdq, SelectLayers
from hqc.passes.rewriting import channel_axis
from hqc.pipeline import run_pass, run_pipeline
from hqc.program import Program
from hqc.recipes import find_recipe
from hqc.sampling import synthetic_task
from hqc.sampling.task import Task, trajectory

Captured = Callable[[str], Program]
SAMPLER = Sampler(images=3, batch_size=2, num_inference_steps=3, guidance_scale=2.0, seed=5)
RELATIVE = 1e-4  # float32 sums over a few thousand values, rotated once


@pytest.fixture
def task() -> Callable[[Program], Task]:
    """The synthetic task keeps its sample's shape, so it suits denoisers whose output has another one as well."""

    def make(program: Program) -> Task:
        found = synthetic_task(program)
        return replace(found, new_scheduler=lambda: _Lazy(found.new_scheduler()))

    return make


class _Lazy:
    """A scheduler that shrinks the sample and ignores the prediction, whose shape need not be the sample's."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def set_timesteps(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps)
        self.timesteps = self.scheduler.timesteps

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample

    def step(self, noise: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        class Out:
            prev_sample = 0.8 * sample

        return Out


def plan_of(program: Program, task: Task, bits: str = "w4a4", keep_float: tuple[str, ...] = ()) -> Program:
    grid = task.timesteps(SAMPLER.num_inference_steps)
    return planned_program(program, find_recipe("hq-dm"), bits, grid, keep_float)


class _Recorder(fx.Interpreter):
    """Every layer's input at every timestep, kept whole: what the analysis must not do."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module())
        self.found: dict[tuple[str, float], list[Tensor]] = {}

    def __call__(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        self.now = float(timestep[0])
        return self.run(*[a for a in (sample, timestep, condition) if a is not None])  # type: ignore[no-any-return]

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        if n.meta.get("role") == "layer":
            self.found.setdefault((n.meta["site"], self.now), []).append(self.env[n.args[0]])  # type: ignore[index]
        return super().run_node(n)


def recorded(program: Program, task: Task) -> dict[tuple[str, float], Tensor]:
    recorder = _Recorder(program)
    for i, n in enumerate((2, 1)):
        for _ in trajectory(task, recorder, n, 3, SAMPLER.guidance_scale, 0.0, SAMPLER.seed + i):
            pass
    return {key: torch.cat(parts) for key, parts in recorder.found.items()}


def numpy_rotated(x: Tensor, axis: int, block: int) -> Any:
    wide = np.moveaxis(x.double().numpy(), axis, -1)
    return (wide.reshape(-1, block) @ linalg.hadamard(block)) / math.sqrt(block)


@pytest.mark.parametrize("name", ["two_sites", "odd_channels", "tied_time_embedding", "shared_input"])
def test_every_number_is_numpys(captured: Captured, task: Callable[[Program], Task], name: str) -> None:
    program = captured(name)
    found = analyse(program, plan_of(program, task(program)), task(program), SAMPLER)
    inputs = recorded(program, task(program))
    layers = dict(program.sites())
    assert [site.plan.site for site in found] == list(layers)
    assert sum(len(site.rows) for site in found) == len(inputs) == 3 * len(layers)
    rotated = 0
    for site in found:
        axis = channel_axis(layers[site.plan.site])
        for row in site.rows:
            x = inputs[site.plan.site, row.timestep]
            wide = x.double().numpy().reshape(-1)
            assert row.values == wide.size
            assert row.max_abs == pytest.approx(np.abs(wide).max())
            _check_basis(row.plain, wide, row.max_abs, site.bits.activation)
            if row.rotated is not None:
                turned = numpy_rotated(x, axis, site.block).reshape(-1)
                _check_basis(row.rotated, turned, np.abs(turned).max(), site.bits.activation)
                rotated += 1
    assert rotated >= 3


def _check_basis(basis: Any, wide: Any, top: float, bits: int) -> None:
    assert basis.max_over_rms == pytest.approx(top / np.sqrt(np.mean(wide**2)), rel=RELATIVE)
    if wide.std() > 1e-6 * np.abs(wide).max():
        assert basis.kurtosis == pytest.approx(stats.kurtosis(wide, fisher=False), rel=1e-3)
    if wide.size > 2048:
        return  # the search sees a sample of long ones
    qmax = 2 ** (bits - 1) - 1
    scales = top / qmax * np.linspace(1 / 60, 1.05, 60)
    noise = [((np.clip(np.round(wide / s), -qmax, qmax) * s - wide) ** 2).sum() for s in scales]
    # Two scales may tie to the last bit of float32: the error counts, not the index.
    assert basis.snr_db == pytest.approx(10 * np.log10((wide**2).sum() / min(noise)), abs=0.02)


def test_sites_that_do_not_rotate_say_so(captured: Captured, task: Callable[[Program], Task]) -> None:
    program = captured("odd_channels")
    found = {s.plan.site: s for s in analyse(program, plan_of(program, task(program)), task(program), SAMPLER)}
    assert {name: (site.block, site.plan.block) for name, site in found.items()} == {
        "sixteen": (16, 16),
        "eight": (8, 8),
        "none": (0, 0),
        "three": (0, 0),
    }
    assert all(row.rotated is None for row in found["none"].rows)
    # A plan without rotation is still told what one would bring.
    recipe = find_recipe("rtn")
    plain = planned_program(program, recipe, "w4a4", task(program).timesteps(3))
    unplanned = {s.plan.site: s for s in analyse(program, plain, task(program), SAMPLER)}
    assert unplanned["sixteen"].plan.block == 0
    assert unplanned["sixteen"].rows[0].rotated == found["sixteen"].rows[0].rotated


def test_awkward_layers_are_analysed_too(captured: Captured, task: Callable[[Program], Task]) -> None:
    program = captured("awkward")
    found = {s.plan.site: s for s in analyse(program, plan_of(program, task(program)), task(program), SAMPLER)}
    assert not found["grouped"].plan.quantised
    assert found["grouped"].block == 0  # its groups would be mixed
    assert found["across"].rows[0].plain.snr_db is not None


@pytest.mark.parametrize("recipe", ["rtn", "hq-dm"])
def test_a_quantised_program_shows_its_own_scales_on_the_float_trajectory(
    captured: Captured, task: Callable[[Program], Task], recipe: str
) -> None:
    program = captured("cross_attention")
    sampler = {"sampler.num_inference_steps": 3, "sampler.guidance_scale": 2.0}
    settings = {**sampler, "calibrate_activations.samples": 2, "calibrate_activations.seed": 9}
    found = find_recipe(recipe).untrained()
    quantised = api.quantise(program, found, "w4a4", task=task(program), settings=settings)
    one_batch = replace(SAMPLER, images=2, seed=9)
    own = analyse(quantised, quantised, task(program), one_batch)
    float_ = analyse(program, plan_of(program, task(program)), task(program), one_batch)
    compared = 0
    for site, plain in zip(own, float_, strict=True):
        table = quantised.state[f"{site.plan.site}.activation_scale_table"]
        for index, (row, wanted) in enumerate(zip(site.rows, plain.rows, strict=True)):
            assert row.plain == wanted.plain
            assert row.program_scale == float(table[index])
            best = row.rotated if site.plan.block else row.plain
            if row.values <= 8192:  # calibration and analysis see the same values
                assert best is not None
                assert best.scale == pytest.approx(row.program_scale, rel=1e-5)
                assert best.snr_db == pytest.approx(row.program_snr_db, abs=1e-3)
                compared += 1
    assert compared > 30


def test_asymmetric_ranges_are_judged_by_their_own_codes(captured: Captured, task: Callable[[Program], Task]) -> None:
    program = captured("two_sites")
    grid = task(program).timesteps(SAMPLER.num_inference_steps)
    chain = [SelectLayers(bits="w4a4"), InsertQdq(grid, activation="asymmetric", weight="asymmetric")]
    quantised = run_pipeline(program, chain)
    zeros = torch.tensor([2.0, 9.0, 14.0])
    quantised = quantised.evolve(state={**quantised.state, "conv.activation_zero_table": zeros})
    site = analyse(quantised, quantised, task(program), SAMPLER)[0]
    inputs = recorded(program, task(program))
    assert len(site.rows) == 3
    for row in site.rows:
        x = inputs["conv", row.timestep].double().numpy()
        zero = float(zeros[grid.index(row.timestep)])
        error = np.clip(np.rint(x) + zero, 0, 15) - zero - x  # every scale is 1
        wanted = 10 * math.log10((x**2).sum() / (error**2).sum())
        assert row.program_snr_db == pytest.approx(wanted, abs=1e-3)


def test_dynamic_ranges_are_judged_by_the_scales_of_their_own_groups(
    captured: Captured, task: Callable[[Program], Task]
) -> None:
    program = captured("two_sites")
    insert = InsertQdq(activation="dynamic", activation_group=8, weight_group=8)
    quantised = run_pipeline(program, [SelectLayers(bits="w4a4", rules="all"), insert])
    site = analyse(quantised, quantised, task(program), SAMPLER)[0]
    inputs = recorded(program, task(program))
    assert len(site.rows) == 3
    for row in site.rows:
        x = inputs["conv", row.timestep].double().numpy()
        groups = x.reshape(len(x), -1, 8, *x.shape[2:])
        scale = np.abs(groups).max(2, keepdims=True) / 7
        error = (np.rint(groups / scale) * scale - groups).reshape(x.shape)
        wanted = 10 * math.log10((x**2).sum() / (error**2).sum())
        assert row.program_snr_db == pytest.approx(wanted, abs=1e-3)
        assert row.program_scale is None, "it has none that is stored"
        assert row.program_snr_db > row.plain.snr_db


def test_the_float_program_is_the_captured_one(captured: Captured, task: Callable[[Program], Task]) -> None:
    program = captured("tied_time_embedding")
    grid = task(program).timesteps(3)
    quantised = planned_program(program, find_recipe("hq-dm"), "w4a4", grid)
    args = program.example_inputs(3)
    wanted = program.module()(*args)
    assert torch.equal(float_program(quantised).module()(*args), wanted)
    assert not torch.equal(quantised.module()(*args), wanted)
    run = Run(quantised)
    assert torch.equal(run.finish(run.start(args)), quantised.module()(*args))


@pytest.mark.parametrize("weights", [False, True], ids=["single", "double"])
def test_a_regular_rotation_is_measured_and_undone(
    captured: Captured, task: Callable[[Program], Task], weights: bool
) -> None:
    """Numbers after rotation are those of the plan's matrix; the float program has the weights of the capture."""
    program = captured("wide_channels")
    grid = task(program).timesteps(3)
    rotation = InsertHadamard(64, kind="regular", weights=weights)
    planned = run_pipeline(program, [SelectLayers(), rotation, InsertQdq(grid)])
    args = program.example_inputs(3)
    wanted = program.module()(*args)
    assert torch.allclose(float_program(planned).module()(*args), wanted, rtol=0, atol=1e-5)
    inputs = recorded(program, task(program))
    found = analyse(planned, planned, task(program), SAMPLER)
    assert [str(site.rotation) for site in found] == ["regular H64"] * 3 + ["regular H32"]
    for site in found:
        row = site.rows[0]
        turned = torch.ops.hqc.hadamard(
            inputs[site.plan.site, row.timestep], site.block, 1 if site.plan.site == "conv" else -1, True
        )
        assert row.rotated is not None
        rms = float(turned.double().square().mean().sqrt())
        assert row.rotated.max_over_rms == pytest.approx(float(turned.abs().max()) / rms, rel=1e-4)
    probe = SensitivityProbe(planned, with_scales(planned, found), args)
    errors = [one.error for one in probe.measure()]
    assert len(errors) == 4
    assert all(0 < error < 1 for error in errors)


def test_a_row_of_several_timesteps_takes_their_largest_scale(
    captured: Captured, task: Callable[[Program], Task]
) -> None:
    program = captured("wide_channels")
    grid = task(program).timesteps(3)
    single, grouped = (
        run_pipeline(program, [SelectLayers(), InsertQdq(grid, activation="asymmetric", groups=groups)])
        for groups in (0, 2)
    )
    found = analyse(program, single, task(program), SAMPLER)
    rows = with_scales(single, found).state["conv.activation_scale_table"]
    table = with_scales(grouped, found).state["conv.activation_scale_table"]
    assert table.tolist() == [float(rows[0]), float(rows[1:].max())]
    # A quantised program is analysed with the rows that it has, scales and zero points.
    state = {**grouped.state, "conv.activation_scale_table": torch.tensor([2.0, 3.0])}
    own = grouped.evolve(state=state)
    site = next(one for one in analyse(own, own, task(program), SAMPLER) if one.plan.site == "conv")
    assert [(row.timestep, row.program_scale) for row in site.rows] == [
        (time, scale) for time, scale in zip(grid, (2.0, 3.0, 3.0), strict=True)
    ]


def test_a_run_drops_what_nobody_reads(captured: Captured) -> None:
    run = Run(captured("cross_attention"))
    values, most = run.start(captured("cross_attention").example_inputs(1)), 0
    for _ in run.steps(values):
        most = max(most, sum(node.op == "call_function" for node in values))
    assert most < 20 < len(run.nodes)
    assert run.nodes[-1] in values


def test_what_cannot_be_analysed_is_refused(captured: Captured, task: Callable[[Program], Task]) -> None:
    program = captured("two_sites")
    planned = plan_of(program, task(program))
    integer = run_pass(planned, FreezeIntegers())
    with pytest.raises(EvaluationError, match="is integer"):
        analyse(integer, integer, task(program), SAMPLER)
    tables = [SelectLayers(bits="w4a4"), InsertQdq(activation="float", weight="lookup")]
    alone = run_pipeline(program, tables)
    with pytest.raises(EvaluationError, match=r"tables beside float activations: .* Give the captured program"):
        analyse(alone, alone, task(program), SAMPLER)
    broken = program.evolve(state={**program.state, "conv.bias": torch.full((16,), torch.nan)})
    with pytest.raises(TrainingError, match="analysis at head: met NaN or infinity at timestep"):
        analyse(broken, planned, task(program), SAMPLER)


# ---- sensitivity ---------------------------------------------------------------------------------------------------


def probe_of(program: Program, task: Task) -> tuple[SensitivityProbe, tuple[SiteAnalysis, ...], tuple[Tensor, ...]]:
    inputs = fixed_inputs(task, SAMPLER, 2, count=2)
    planned = plan_of(program, task)
    sites = analyse(program, planned, task, SAMPLER, inputs=inputs)
    return SensitivityProbe(program, with_scales(planned, sites), inputs.batch()), sites, inputs.batch()


@pytest.mark.parametrize("name", ["two_sites", "shared_weights", "in_place", "tied_time_embedding", "cross_attention"])
@torch.no_grad()
def test_sensitivity_is_that_of_a_program_with_one_site_quantised(
    captured: Captured, task: Callable[[Program], Task], name: str
) -> None:
    program = captured(name)
    probe, sites, args = probe_of(program, task(program))
    wanted = program.module()(*args)
    names = [site for site, _ in program.sites()]
    found = probe.measure()
    assert [s.site for s in found] == names
    for one in found[:: max(1, len(found) // 8)]:
        others = tuple(site for site in names if site != one.site)
        alone = with_scales(plan_of(program, task(program), keep_float=others), sites)
        assert [plan.site for plan in alone.plan.quantised] == [one.site]
        output = alone.module()(*args)
        error = float((output - wanted).norm() / wanted.norm())
        assert error > 0
        assert one.error == pytest.approx(error, rel=1e-4)
        times = args[1]
        for t, part in one.by_timestep:
            rows = times == t
            assert part == pytest.approx(float((output[rows] - wanted[rows]).norm() / wanted[rows].norm()), rel=1e-4)
    everything = with_scales(plan_of(program, task(program)), sites).module()(*args)
    assert probe.all_sites_error() == pytest.approx(float((everything - wanted).norm() / wanted.norm()), rel=1e-5)
    assert probe.estimated_seconds > 0


def test_fixed_inputs_are_conditional_samples_of_the_trajectory(
    captured: Captured, task: Callable[[Program], Task]
) -> None:
    program = captured("cross_attention")
    _, _, (sample, times, condition) = probe_of(program, task(program))
    assert sample.shape == (4, 3, 8, 8)
    assert times.tolist() == [0.0, 0.0, 666.0, 666.0]  # the first and the last of 0, 333, 666
    assert bool((condition.flatten(1).abs().sum(1) > 0).all())  # guidance's null condition is zero
    with pytest.raises(EvaluationError, match="visited none of the timesteps"):
        FixedInputs((5.0,), 1).batch()


# ---- the report as data --------------------------------------------------------------------------------------------


def report_of(program: Program, task: Task, **options: Any) -> Report:
    planned = plan_of(program, task)
    measured = {"program": "tiny", "bits": "w4a4"}
    phase = lambda name, total: nullcontext(lambda done, note="": None)  # noqa: E731
    return measure(program, planned, task, SAMPLER, measured, phase=phase, **options)


def test_csv_and_json_hold_everything(captured: Captured, task: Callable[[Program], Task]) -> None:
    program = captured("two_sites")
    report = report_of(program, task(program))
    lines = csv_text(report).splitlines()
    assert lines[0].split(",") == list(CSV_COLUMNS)
    assert len(lines) == 1 + 2 * 3
    assert [line.split(",")[0] for line in lines[1:]] == ["conv"] * 3 + ["head"] * 3
    first = dict(zip(CSV_COLUMNS, lines[1].split(","), strict=True))
    row = report.sites[0].rows[0]
    assert float(first["snr_rotated_db"]) == pytest.approx(row.rotated.snr_db if row.rotated else 0, rel=1e-6)
    assert first["program_scale"] == ""
    data = json.loads(json.dumps(report_data(report), allow_nan=False))
    assert [site["plan"]["site"] for site in data["sites"]] == ["conv", "head"]
    assert data["sites"][0]["rows"][0]["plain"]["snr_db"] == row.plain.snr_db
    assert data["measured"]["timesteps"] == [0.0, 333.0, 666.0]
    errors = [s["error"] for s in data["sensitivity"]]
    assert errors == sorted(errors, reverse=True)
    assert data["summary"]["most_sensitive"][0]["site"] == data["sensitivity"][0]["site"]


@pytest.mark.parametrize("stage", ["captured", "quantised"])
def test_sites_that_a_pass_removed_are_not_reported(
    captured: Captured, task: Callable[[Program], Task], stage: str
) -> None:
    """The float model of a captured program has them; the recipe's passes take them out."""
    program = captured("single_key")
    planned = plan_of(program, task(program))
    own = program if stage == "captured" else planned
    report = report_of(own, task(program))
    assert [site.plan.site for site in report.sites] == ["to_v", "to_out", "head"]
    assert [site.site for site in report.sensitivity] == ["to_v", "to_out", "head"]
    assert all(len(site.rows) == 3 for site in report.sites)
    assert all(site.error > 0 for site in report.sensitivity)


def test_the_summary_takes_medians_over_rotated_sites(captured: Captured, task: Callable[[Program], Task]) -> None:
    program = captured("odd_channels")
    report = report_of(program, task(program), sensitivity=False)
    assert report.sensitivity_note == "Not measured (--no-sensitivity)."
    data = summary(report)
    assert (data["sites"], data["quantised"], data["rotated"]) == (4, 4, 2)
    wanted = np.median([np.median([row.plain.snr_db for row in s.rows]) for s in report.sites if s.plan.block])
    assert data["snr_db"]["before"] == pytest.approx(wanted)
    assert data["all_sites_error"] is None
    assert data["most_sensitive"] == []


def test_names_are_no_formulas_in_a_spreadsheet(captured: Captured, task: Callable[[Program], Task]) -> None:
    program = captured("two_sites")
    report = report_of(program, task(program), sensitivity=False)
    hostile = replace(report.sites[0], plan=replace(report.sites[0].plan, site='=HYPERLINK("x")'))
    lines = csv_text(replace(report, sites=(hostile,))).splitlines()
    assert lines[1].startswith("\"'=HYPERLINK(")


def test_a_long_sensitivity_waits_to_be_asked_for(
    captured: Captured, task: Callable[[Program], Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = captured("two_sites")
    monkeypatch.setattr("hqc.evaluation.analysis_run.LONGEST_UNASKED_SECONDS", 0.0)
    said: list[str] = []
    unasked = report_of(program, task(program), say=said.append)
    assert unasked.sensitivity == ()
    assert "Ask with --sensitivity" in unasked.sensitivity_note
    assert said == [said[0]]
    assert said[0].startswith("sensitivity of 2 sites: about ")
    assert len(report_of(program, task(program), sensitivity=True).sensitivity) == 2
