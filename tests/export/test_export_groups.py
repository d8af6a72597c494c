"""Scales of groups of channels, stored and dynamic: the portable export equals torch, every other target refuses."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import hqc
from hqc.calibration import CalibrateActivations, CalibrateWeights, Decompose, Smooth, calibrate
from hqc.calibration.weights import source_weight, symmetric_weight_scale
from hqc.errors import ArtefactError, ExportError, PlanError
from hqc.evaluation.comparison.size import true_bytes, weight_bytes
from hqc.export import export_program
from hqc.export.ort_session import open_session
from hqc.export.reference import verification_inputs, without_quantisers
from hqc.export.surveys import survey
from hqc.passes import (
    AttachBranch,
    AttachLora,
    FinetuneOnly,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    InsertSmoothing,
    PackInt4,
    RotateWeights,
    SelectLayers,
)
from hqc.pipeline import Pass, run_pass, run_pipeline, run_procedure
from hqc.plan import QuantPlan
from hqc.program import Program, is_op
from hqc.recipes import find_recipe
from hqc.runtimes.integer.forms import integer_form
from hqc.sampling import Sampler, Work, synthetic_task
from hqc.storage import load_program, save_program
from hqc.structure import site_problems
from hqc.training import Distil, Group, Reconstruct

Captured = Callable[[str], Program]
ops = torch.ops.hqc
GRID = (0.0, 500.0, 999.0)
EQUAL_CODES = 5e-6  # float32 sums in another order
BOTH = InsertQdq(GRID, activation="dynamic", activation_group=16, weight_group=16)
FORMS = {
    "both": BOTH,
    "last group shorter": replace(BOTH, activation_group=10, weight_group=20),
    "all channels of a token": InsertQdq(GRID, activation="dynamic"),
    "weights alone": InsertQdq(GRID, weight_group=16),
}


def quantised(program: Program, insert: InsertQdq = BOTH, *between: Pass, bits: str = "w4a4") -> Program:
    steps = [SelectLayers(bits=bits, rules="all"), *between, insert]
    made = run_pipeline(program, steps)
    state = {n: torch.full_like(t, 0.3) if n.endswith("scale_table") else t for n, t in made.state.items()}
    return run_procedure(made.evolve(state=state), CalibrateWeights(candidates=1), Work(program))


def run_file(folder: Path, program: Program, batch: int = 8) -> tuple[Any, Any]:
    args = verification_inputs(program, batch)
    feeds = {spec.name: arg.numpy() for spec, arg in zip(program.inputs, args, strict=True)}
    return open_session(folder / "model.onnx", threads=1).run(None, feeds)[0], program.module()(*args).numpy()


@pytest.mark.parametrize(
    ("model", "form"),
    [
        *(("two_sites", "both"), ("two_sites", "all channels of a token"), ("two_sites", "weights alone")),
        *(("geometry", "both"), ("odd_channels", "last group shorter"), ("shared_input", "both")),
        ("shared_weights", "last group shorter"),
    ],
)
def test_the_portable_export_equals_torch(captured: Captured, model: str, form: str, tmp_path: Path) -> None:
    program = quantised(captured(model), FORMS[form])
    report = export_program(program, "portable", tmp_path / "x", float_program=captured(model))
    assert report.verification.network.forced_error <= EQUAL_CODES
    assert len(report.verification.sites) == len(program.plan.quantised) > 0
    assert report.verification.network.quantisation_error > 1e-3
    found, wanted = run_file(tmp_path / "x", program)
    errors = sorted(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, wanted, strict=True))
    assert errors[4] <= EQUAL_CODES  # a sample may hold a code that flipped


@pytest.mark.parametrize("rotation", [InsertHadamard(), InsertHadamard(16, kind="regular", weights=True)])
def test_rotated_and_packed_and_read_by_another_implementation(
    captured: Captured, tmp_path: Path, rotation: Pass
) -> None:
    program = quantised(captured("two_sites"), BOTH, rotation)
    assert any(plan.block for plan in program.plan.sites)
    export_program(program, "portable", tmp_path / "x", float_program=captured("two_sites"))
    model = onnx.load(str(tmp_path / "x" / "model.onnx"))
    assert {t.data_type for t in model.graph.initializer if t.name.endswith(".weight_packed")} == {
        onnx.TensorProto.INT4
    }
    args = verification_inputs(program, 2)
    feeds = {spec.name: arg.numpy() for spec, arg in zip(program.inputs, args, strict=True)}
    found, wanted = ReferenceEvaluator(model).run(None, feeds)[0], program.module()(*args).numpy()
    assert min(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, wanted, strict=True)) <= EQUAL_CODES


def test_a_layer_is_what_loops_make_of_it(captured: Captured) -> None:
    """Groups of 16 of the head's 16 inputs, and of the convolution's 32 in every tap and pixel, in numpy."""
    program = quantised(captured("two_sites"))
    nodes = {node.meta["site"]: node for node in program.graph.nodes if node.meta.get("role") == "layer"}
    x = torch.randn(2, 32, 5, 5, generator=torch.Generator().manual_seed(1))

    def on_grid(values: Any, axis: int, top: int, low: int) -> Any:
        values = np.moveaxis(values.double().numpy(), axis, -1)
        split = values.reshape(*values.shape[:-1], -1, 16)
        scale = np.abs(split).max(-1, keepdims=True) / top
        found = scale * np.clip(np.rint(split / scale), low, top)
        return torch.from_numpy(np.moveaxis(found.reshape(values.shape), -1, axis)).float()

    weight, bias = program.state["conv.weight"], program.state["conv.bias"]
    wanted = torch.nn.functional.conv2d(on_grid(x, 1, 7, -7), on_grid(weight, 1, 7, -8), bias, padding=1)
    quantiser, own = nodes["conv"].args[0], nodes["conv"].args[1]
    scale = ops.dynamic_scale(x, *quantiser.args[1].args[1:])
    real = quantiser.target(x, scale, *quantiser.args[2:])
    found = own.target(weight, program.state["conv.weight_scale"], *own.args[2:])
    torch.testing.assert_close(torch.nn.functional.conv2d(real, found, bias, padding=1), wanted, rtol=1e-5, atol=1e-5)
    assert program.state["conv.weight_scale"].shape == (16, 2, 3, 3)
    assert {plan.widths for plan in program.plan.sites} == {"w4g16a4g16"}


def test_nothing_of_an_activation_is_stored(captured: Captured) -> None:
    program = quantised(captured("two_sites"))
    assert not [name for name in program.state if "activation" in name or name == "timestep_grid"]
    assert not [node for node in program.graph.nodes if is_op(node, ops.nearest_timestep.default)]

    def never(model: object) -> None:
        raise AssertionError("there is nothing to calibrate")

    assert calibrate(program, never) is program
    args = program.example_inputs(2)
    scaled = (args[0] * 100, *args[1:])
    plain = run_pipeline(captured("two_sites"), [SelectLayers(bits="w4a4", rules="all"), InsertQdq(GRID)])
    one, other = (p.module()(*scaled) for p in (program, plain))
    wanted = captured("two_sites").module()(*scaled)
    assert float((one - wanted).norm() / wanted.norm()) < 0.2 < float((other - wanted).norm() / wanted.norm())


def test_frozen_packed_and_stored_it_is_the_same_to_the_bit(captured: Captured, tmp_path: Path) -> None:
    program = quantised(captured("odd_channels"), FORMS["last group shorter"])
    frozen = run_pipeline(program, [FreezeIntegers(), PackInt4()])
    args = program.example_inputs(2, seed=3)
    assert torch.equal(frozen.module()(*args), program.module()(*args))
    for one in (program, frozen):
        save_program(one, tmp_path / f"{one.stage}.hqc")
        again = load_program(tmp_path / f"{one.stage}.hqc")
        assert again.plan == one.plan
        assert torch.equal(again.module()(*args), program.module()(*args))
    assert true_bytes(frozen) == true_bytes(program)
    assert weight_bytes(frozen) == weight_bytes(program)
    scales = sum(t.numel() for name, t in program.state.items() if name.endswith("weight_scale"))
    floats = sum(t.numel() for name, t in program.state.items() if name.endswith(".weight"))
    other = sum(t.numel() for name, t in program.state.items() if not name.endswith((".weight", "weight_scale")))
    assert true_bytes(program) == 4 * scales + floats / 2 + 4 * other
    plain = without_quantisers(program)
    assert plain is not None
    torch.testing.assert_close(plain.module()(*args), captured("odd_channels").module()(*args))


@pytest.mark.parametrize("form", ["both", "all channels of a token", "weights alone"])
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_other_targets_refuse(captured: Captured, form: str, target: str, tmp_path: Path) -> None:
    program = quantised(captured("two_sites"), FORMS[form])
    said = r"takes integer products of whole rows; site conv \(w4.*\) has scales of groups or of the values themselves"
    with pytest.raises(ExportError, match=f"target {target}: {said}.*recipe svdquant"):
        export_program(program, target, tmp_path / "x")  # type: ignore[arg-type]
    frozen = run_pipeline(program, [FreezeIntegers()])
    with pytest.raises(ExportError, match=said):
        export_program(frozen, target, tmp_path / "x")  # type: ignore[arg-type]
    (obstacle,) = survey(program, target).obstacles  # type: ignore[arg-type]
    assert re.search(said, str(obstacle))
    assert not survey(program, "portable").obstacles
    with pytest.raises(ExportError, match=f"runtime torch-cuda: {said}"):
        integer_form(program)
    assert not list(tmp_path.iterdir())
    assert run_pass(frozen, RotateWeights()).history[-1].missed == tuple(
        (plan.site, "scales of groups: no integer product of whole rows") for plan in program.plan.sites
    )


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"weight_group": 0}, "about groups of its weight"),
    ({"activation_group": 0}, "its activation's codes are not those of 4 bits"),
    ({"weight_group": 8}, "its weight has groups of 16 channels; the plan says 8"),
    ({"activation_group": 32}, "its activation has groups of 16 channels; the plan says 32"),
    ({"activation_bits": 3}, "its activation's codes are not those of 3 bits"),
    ({"weight_bits": 3}, "its weight's codes are not those of 3 bits"),
]


@pytest.mark.parametrize(
    ("stage", "changed", "said"),
    [
        *(("quantised", *case) for case in CHANGES if case[0] != {"weight_group": 0}),
        ("quantised", {"weight_group": 0}, "its weight's codes are not those of 4 bits"),
        *(("integer", *case) for case in CHANGES if "weight_bits" not in case[0]),  # frozen codes may have fewer bits
    ],
)
def test_a_plan_that_the_graph_is_not_of(
    captured: Captured, stage: str, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    program = quantised(captured("two_sites"))
    program = program if stage == "quantised" else run_pipeline(program, [FreezeIntegers()])
    assert site_problems(program) == []
    site = replace(program.plan["conv"], **changed)
    wrong = program.evolve(plan=program.plan.with_sites({"conv": site}))
    assert any(said in text for text in site_problems(wrong)), site_problems(wrong)
    save_program(wrong, tmp_path / "x.hqc")
    with pytest.raises(ArtefactError):
        load_program(tmp_path / "x.hqc")


def test_a_graph_that_scales_by_something_else(captured: Captured) -> None:
    program = quantised(captured("two_sites"))
    for index, other, said in (
        (1, 3, "scales are not those of its own values"),
        (3, 4, "scales are not those of its own values"),
    ):
        changed = program.evolve(graph=hqc.program.copy_graph(program.graph))
        scale = next(n for n in changed.graph.nodes if n.meta.get("role") == "dynamic_scale")
        scale.args = (*scale.args[:index], other, *scale.args[index + 1 :])
        assert any(said in text for text in site_problems(changed)), site_problems(changed)
    plain = run_pipeline(captured("two_sites"), [SelectLayers(bits="w4a4", rules="all"), InsertQdq(GRID)])
    mixed = plain.evolve(plan=plain.plan.with_sites({"conv": replace(plain.plan["conv"], activation_group=16)}))
    assert any("about groups of its activation" in text for text in site_problems(mixed))


@pytest.mark.parametrize(
    "changed",
    [
        *({"weight_group": -1}, {"activation_group": 1.5}, {"activation_group": True}),
        *({"weight_symmetric": False}, {"activation_symmetric": False}, {"weight_lookup": True}),
        {"weight_bits": None, "activation_bits": None},
    ],
)
def test_plans_that_make_no_sense(captured: Captured, changed: dict[str, Any]) -> None:
    data = json.loads(json.dumps(quantised(captured("two_sites")).plan.to_dict()))
    assert QuantPlan.from_dict(data).sites[0].weight_group == 16
    data["sites"][0] |= changed
    with pytest.raises(PlanError, match="not a quantisation plan"):
        QuantPlan.from_dict(data)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight_group": -1}, "weight_group is -1; expected 0, 1, 2, …"),
        ({"weight_group": 16, "weight": "asymmetric"}, "gives asymmetric weights scales of 16 channels"),
        ({"activation_group": 16}, "has activation_group=16 and symmetric activations, which have tables"),
        ({"activation": "dynamic", "static": True}, "has dynamic activations, which have no tables"),
        ({"activation": "dynamic", "groups": 2}, "has dynamic activations, which have no tables"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        InsertQdq(**options)


class _Work(Work):
    """Calls the model on random inputs."""

    def walk(self, what: str, denoise: Any, samples: int, seed: int) -> Iterator[int]:
        for step, timestep in enumerate(GRID):
            yield step
            sample, _, *conditions = self.teacher.example_inputs(4, seed=step)
            denoise(sample, torch.full((4,), timestep), *conditions)


@pytest.mark.parametrize("model", ["two_sites", "geometry"])
def test_smoothing_and_branch_of_groups(captured: Captured, model: str, tmp_path: Path) -> None:
    """The search measures what is quantised then, and the branch takes what groups leave."""
    captured_program = captured(model)
    work = _Work(captured_program, synthetic_task(captured_program), Sampler(3, 1.0, 0.0))
    smooth = Smooth(candidates=9, timesteps=3, rows=20, activation="dynamic", activation_group=16, weight_group=16)
    steps = (
        *(SelectLayers(bits="w4a4", rules="all"), InsertSmoothing(), AttachBranch(rank=2), smooth, BOTH),
        *(CalibrateWeights(candidates=1), Decompose(rounds=4, timesteps=3, rows=20, candidates=1)),
    )
    program = captured_program
    for step in steps:
        program = run_procedure(program, step, work) if hasattr(step, "run") else run_pass(program, step)
    layers = dict(program.sites())
    for plan in program.plan.quantised:
        weight = program.state[source_weight(layers[plan.site].args[1])]
        stored = program.state[f"{plan.site}.weight_scale"]
        torch.testing.assert_close(stored, symmetric_weight_scale(weight, -8, 7, 1, 16))
        assert "weight error" in plan.reason
    report = export_program(program, "portable", tmp_path / "x", float_program=captured_program)
    assert report.verification.network.forced_error <= EQUAL_CODES
    args = program.example_inputs(8, seed=5)
    wanted = captured_program.module()(*args)
    without = quantised(captured_program)
    errors = [float((one.module()(*args) - wanted).norm() / wanted.norm()) for one in (program, without)]
    assert errors[0] < errors[1]


def test_training_refuses_groups(captured: Captured) -> None:
    program, float_program = quantised(captured("two_sites")), captured("two_sites")
    work = Work(float_program, synthetic_task(float_program), Sampler(3, 1.0, 0.0))
    steps: tuple[Any, ...] = (
        Distil(groups=(Group("*.weight_scale", rate=1e-3),), updates=1, batch_size=1),
        Reconstruct(iterations=1, samples=1),
    )
    for step in steps:
        with pytest.raises(PlanError, match=r"site conv has scales of groups \(w4g16a4g16\), which no step trains"):
            step.run(program, work)
    lora = run_pass(program, AttachLora())
    assert lora.history[-1].missed == tuple((p.site, "scales of groups are not trained") for p in program.plan.sites)
    with pytest.raises(PlanError, match="names no quantised layer that may learn"):
        run_pass(program, FinetuneOnly(sites=("*",), share=1.0))
    recipe = find_recipe("hq-dm")
    with pytest.raises(PlanError, match="would train scales of groups, which have no gradient"):
        recipe.having("insert_qdq", weight_group=64)
    with pytest.raises(PlanError, match="has dynamic activations, and rotations are chosen by ranges of whole tensors"):
        find_recipe("svdquant-grouped").rotated(find_recipe("hqc").step("choose_rotation"))


def test_wider_codes_than_four_bits(captured: Captured, tmp_path: Path) -> None:
    program = quantised(captured("two_sites"), BOTH, bits="w8a8")
    report = export_program(program, "portable", tmp_path / "x", float_program=captured("two_sites"))
    assert report.verification.network.forced_error <= EQUAL_CODES
    assert report.verification.network.quantisation_error < 0.02


def test_zeros_stay_zeros(captured: Captured, tmp_path: Path) -> None:
    """A group of zeros in the weights, and inputs of nothing."""
    plain = captured("two_sites")
    weight = plain.state["conv.weight"].clone()
    weight[:, :16] = 0
    program = quantised(plain.evolve(state={**plain.state, "conv.weight": weight}))
    assert bool((program.state["conv.weight_scale"][:, 0] == 1).all())
    args = program.example_inputs(2)
    nothing = (torch.zeros_like(args[0]), *args[1:])
    assert bool(program.module()(*nothing).isfinite().all())
    export_program(program, "portable", tmp_path / "x")


@pytest.mark.parametrize("candidates", [1, 40])
def test_scales_of_groups_are_those_of_rows(candidates: int) -> None:
    weight = torch.randn(6, 10, 3, 3, generator=torch.Generator().manual_seed(0))
    found = symmetric_weight_scale(weight, -8, 7, candidates, 4)
    assert found.shape == (6, 3, 3, 3)
    for place in ((0, 0, 0, 0), (3, 1, 2, 1), (5, 2, 0, 2)):
        row, group, *tap = place
        own = weight[row, 4 * group : 4 * group + 4, tap[0], tap[1]].unsqueeze(0)
        wanted = symmetric_weight_scale(own, -8, 7, candidates, 0)
        assert found[place] == wanted[0]
        assert candidates > 1 or wanted[0] == own.abs().max() / 7
    assert found.min() > 0


def test_calibration_of_static_tables_beside_groups(captured: Captured) -> None:
    """Weights in groups, activations in tables: those are calibrated as ever."""
    plain = captured("two_sites")
    program = run_pipeline(plain, [SelectLayers(bits="w4a4", rules="all"), FORMS["weights alone"]])
    work = _Work(plain, synthetic_task(plain), Sampler(3, 1.0, 0.0))
    found = run_procedure(program, CalibrateActivations(samples=1, candidates=10), work)
    assert bool((found.state["conv.activation_scale_table"] != 1).all())
