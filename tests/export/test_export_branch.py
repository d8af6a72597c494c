"""Sites that are smoothed and have a float branch, in every target: equal to torch, site by site and as a whole."""

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from hqc.calibration import CalibrateActivations, CalibrateWeights, Decompose, Smooth
from hqc.evaluation.export_errors import compare_export
from hqc.evaluation.layer_errors import compare_programs
from hqc.export import TensorRtOptions, export_program
from hqc.export.ort_session import open_session
from hqc.export.reference import verification_inputs, without_quantisers
from hqc.passes import AttachBranch, InsertHadamard, InsertQdq, InsertSmoothing, SelectLayers
from hqc.pipeline import Pass, run_pass, run_procedure
from hqc.program import Program
from hqc.sampling import Sampler, Work, synthetic_task

Captured = Callable[[str], Program]
GRID = (0.0, 500.0, 999.0)
EQUAL_CODES = 5e-6  # float32 sums in another order
MODELS = ["two_sites", "geometry", "shared_input", "shared_weights"]


def decomposed(program: Program, *rotation: Pass, kind: str = "symmetric") -> Program:
    """By SVDQuant's steps, on few samples."""
    work = _Work(program, synthetic_task(program), Sampler(3, 1.0, 0.0))
    insert = InsertQdq(GRID, activation=kind, weight=kind)  # type: ignore[arg-type]
    steps = (
        *(SelectLayers(), InsertSmoothing(), AttachBranch(rank=2), Smooth(candidates=5, timesteps=3, rows=20)),
        *(*rotation, insert, CalibrateWeights(candidates=20), Decompose(rounds=4, timesteps=3, rows=20)),
        CalibrateActivations(samples=1, candidates=20),
    )
    for step in steps:
        program = run_procedure(program, step, work) if hasattr(step, "run") else run_pass(program, step)
    return program


class _Work(Work):
    """Calls the model on random inputs: the output of most of these is no noise that a sampler could go on with."""

    def walk(self, what: str, denoise, samples: int, seed: int) -> Iterator[int]:
        for step, timestep in enumerate(GRID):
            yield step
            sample, _, *conditions = self.teacher.example_inputs(4, seed=step)
            denoise(sample, torch.full((4,), timestep), *conditions)


@pytest.fixture(scope="module")
def made(captured: Captured) -> Callable[..., Program]:
    found: dict[str, Program] = {}

    def build(name: str, *rotation: Pass, kind: str = "symmetric") -> Program:
        key = f"{name} {rotation} {kind}"
        if key not in found:
            found[key] = decomposed(captured(name), *rotation, kind=kind)
        return found[key]

    return build


def _check(program: Program, report) -> None:
    network = report.verification.network
    assert network.forced_error <= EQUAL_CODES
    assert len(report.verification.sites) == len(program.plan.quantised) > 0
    assert network.quantisation_error > 1e-3


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("model", MODELS)
def test_exports_equal_torch(captured: Captured, made, tmp_path, model: str, target) -> None:
    program = made(model)
    assert all(plan.smoothed and plan.branch_rank for plan in program.plan.quantised)
    _check(program, export_program(program, target, tmp_path / "x", float_program=captured(model)))
    graph = onnx.load(str(tmp_path / "x" / "model.onnx")).graph
    kinds = {node.op_type for node in graph.node}
    assert ("MatMulIntegerToFloat" in kinds) == (target == "onnxruntime")
    args = verification_inputs(program, 8)
    feeds = {spec.name: arg.numpy() for spec, arg in zip(program.inputs, args, strict=True)}
    found = open_session(tmp_path / "x" / "model.onnx", threads=1).run(None, feeds)[0]
    wanted = program.module()(*args).numpy()
    errors = sorted(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, wanted, strict=True))
    assert errors[4] <= EQUAL_CODES  # a sample may hold a code that flipped


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("rotation", [InsertHadamard(), InsertHadamard(16, kind="regular", weights=True)])
def test_rotations_between(captured: Captured, made, tmp_path, rotation: Pass, kind: str) -> None:
    program = made("two_sites", rotation, kind=kind)
    assert any(plan.block for plan in program.plan.sites)
    for target in ("portable", "onnxruntime"):
        _check(program, export_program(program, target, tmp_path / target, float_program=captured("two_sites")))


def test_another_implementation_of_the_file(made, tmp_path) -> None:
    program = made("geometry")
    export_program(program, "portable", tmp_path / "x")
    args = verification_inputs(program, 2)
    feeds = {spec.name: arg.numpy() for spec, arg in zip(program.inputs, args, strict=True)}
    found = ReferenceEvaluator(onnx.load(str(tmp_path / "x" / "model.onnx"))).run(None, feeds)[0]
    wanted = program.module()(*args).numpy()
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, wanted, strict=True)]
    assert min(errors) <= EQUAL_CODES


@pytest.mark.parametrize("plugins", ["none", "qdp"])
@pytest.mark.parametrize("model", MODELS)
def test_tensorrt(captured: Captured, made, tmp_path, model: str, plugins) -> None:
    options = TensorRtOptions(dtype="fp32", plugins=plugins, plugin_archs=())
    program = made(model)
    report = export_program(program, "tensorrt", tmp_path / "x", float_program=captured(model), tensorrt=options)
    _check(program, report)
    assert not [layer for layer in report.layers if "float" in str(layer.form)]


@pytest.mark.parametrize("plugins", ["none", "qdp"])
def test_tensorrt_in_half_precision(captured: Captured, made, tmp_path, plugins) -> None:
    """Smoothing is of the site, so in float32; both layers of a branch run in half precision."""
    options = TensorRtOptions(dtype="fp16", plugins=plugins, plugin_archs=())
    program = made("two_sites", InsertHadamard())
    report = export_program(program, "tensorrt", tmp_path / "x", float_program=captured("two_sites"), tensorrt=options)
    assert report.twin.network.forced_error <= EQUAL_CODES
    assert report.verification.network.forced_error <= 16 * 2.0**-11
    graph = onnx.load(str(tmp_path / "x" / "model.onnx")).graph
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    assert sum("branch_" in name for name in half) == 4
    assert not any("smoothing" in name for name in half)


def test_weight_only_keeps_the_smoothing(captured: Captured, made, tmp_path) -> None:
    options = TensorRtOptions(dtype="fp32", weight_only=("head",), plugin_archs=())
    for rotation in ((), (InsertHadamard(),)):
        program = made("two_sites", *rotation)
        folder = tmp_path / str(len(rotation))
        report = export_program(program, "tensorrt", folder, float_program=captured("two_sites"), tensorrt=options)
        assert report.verification.network.forced_error <= EQUAL_CODES


@pytest.mark.parametrize("target", ["portable", "onnxruntime", "tensorrt"])
def test_an_export_is_compared_with_branches(captured: Captured, made, tmp_path, target) -> None:
    """What arrives at a site is its whole result, also against the float model, whose graph is another."""
    program = made("two_sites")
    options = {"tensorrt": TensorRtOptions(dtype="fp32", plugin_archs=())} if target == "tensorrt" else {}
    export_program(program, target, tmp_path / "x", **options)
    args = program.example_inputs(3, seed=2)
    for error in compare_export(program, tmp_path / "x", args).sites:
        assert error.arrives.relative < 0.05, error  # a code may flip
        if error.made is not None:
            assert error.made.relative < 0.05
    against = {error.site: error.arrives for error in compare_export(captured("two_sites"), tmp_path / "x", args).sites}
    values = dict(_whole(captured("two_sites"), program, args))
    for site, found in against.items():
        assert found is not None
        assert found.relative == pytest.approx(values[site], rel=0.1)


def _whole(a: Program, b: Program, args):
    for error in compare_programs(a, b, args).sites:
        yield error.site, error.arrives.relative


def test_programs_are_compared_with_branches(captured: Captured, made) -> None:
    """Without quantisers, at every site nothing is left of the difference."""
    a = captured("two_sites")
    for rotation in ((), (InsertHadamard(16, kind="regular", weights=True),)):
        b = without_quantisers(made("two_sites", *rotation))
        for error in compare_programs(a, b, a.example_inputs(2)).sites:
            assert error.arrives.relative < 1e-5
            assert error.made.relative < 1e-5
