"""Programs exported for TensorRT and built by TensorRT-RTX: the zoo, every option, and the whole bundled UNet."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zoo
from engine_programs import ARCHS, quantised

from hqc.engines import EngineReport, build_engines
from hqc.export import export_program
from hqc.export.tensorrt.options import TensorRtOptions
from hqc.program import Program

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="TensorRT-RTX has no wheel for macOS")

PRODUCTS = {"int8 conv": 1, "int8 gemm": 1, "int8 conv, two digits": 2, "int8 gemm, two digits": 2}
"""Form of a layer in report.json -> its products in the file."""


def build(program: Program, folder: Path, archs: tuple[str, ...] = ("sm_86",), **options: object) -> EngineReport:
    # What is verified is tests/export's matter: one sample is enough here.
    export_program(program, "tensorrt", folder, tensorrt=TensorRtOptions(**options), verify_batch=1)  # type: ignore[arg-type]
    return build_engines(folder, archs=archs)


def check(report: EngineReport) -> dict[str, int]:
    """Every layer that the export's report calls int8 is INT8 in every engine; the forms and how many layers each."""
    written = json.loads((report.folder / "report.json").read_text())
    wanted = sum(PRODUCTS.get(layer["form"], 0) for layer in written["layers"])
    sites = {layer["site"] for layer in written["layers"] if layer["form"] in PRODUCTS}
    assert wanted > 0
    for engine in report.engines:
        assert engine.coverage.exceptions == ()
        assert (engine.coverage.products, engine.coverage.int8) == (wanted, wanted)
        kernels = [k for k in engine.layers if k.kind in ("correlation", "gemm") and k.inputs[0].dtype == "Int8"]
        assert sites == {site for kernel in kernels for site in kernel.sites}
    return dict(written["forms"])


@pytest.mark.parametrize("name", zoo.PLAIN)
def test_four_bits(name: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    forms = check(build(quantised(captured(name), "w4a4"), tmp_path / "x"))
    assert forms.keys() & {"int8 conv", "int8 gemm"}


@pytest.mark.parametrize("name", ["two_sites", "geometry", "shared_input"])
def test_eight_bits_take_two_digits_where_rotated(
    name: str, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    forms = check(build(quantised(captured(name), "w8a8"), tmp_path / "x"))
    assert forms.keys() & {"int8 conv, two digits", "int8 gemm, two digits"}


@pytest.mark.parametrize("name", ["two_sites", "geometry", "shared_input"])
def test_asymmetric_ranges(name: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    """Max and Min with looked-up bounds in the place of Clip: the products are INT8 as before."""
    forms = check(build(quantised(captured(name), "w4a4", "asymmetric"), tmp_path / "x"))
    assert any(form.startswith("int8") for form in forms)


def types(report: EngineReport) -> set[str]:
    """Of all that the engine's kernels hand to each other."""
    return {tensor.dtype for layer in report.engines[0].layers for tensor in (*layer.inputs, *layer.outputs)}


@pytest.mark.parametrize(("dtype", "name"), [("fp16", "Half"), ("bf16", "BFloat16"), ("fp32", "Float")])
def test_types_of_activations(dtype: str, name: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    report = build(quantised(captured("shared_input"), "w4a4"), tmp_path / "x", dtype=dtype)
    check(report)
    assert types(report) - {"Float", "Int8", "Int32", "Int64"} == {name} - {"Float"}


@pytest.mark.parametrize(
    ("model", "options", "kind"),
    [
        pytest.param("in_place", {}, "correlation", id="image, conv"),
        pytest.param("in_place", {"image_rotation": "matmul"}, "gemm", id="image, matmul"),
        pytest.param("shared_input", {}, "gemm", id="tokens, matmul"),
        pytest.param("shared_input", {"token_rotation": "conv"}, "correlation", id="tokens, conv"),
    ],
)
def test_rotations(
    model: str, options: dict[str, object], kind: str, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """Whatever is neither quantised nor attention's is a rotation, in the form that was asked for."""
    report = build(quantised(captured(model), "w4a4"), tmp_path / "x", **options)
    check(report)
    float_kernels = [
        layer
        for layer in report.engines[0].layers
        if layer.kind in ("correlation", "gemm") and layer.inputs[0].dtype == "Float" and layer.constants
    ]
    assert {layer.kind for layer in float_kernels} == {kind}
    assert all(layer.constants[0].shape[1] == 32 for layer in float_kernels)


def test_weight_only_layers_are_read_as_int4(captured: Callable[[str], Program], tmp_path: Path) -> None:
    report = build(quantised(captured("shared_input"), "w4a4"), tmp_path / "x", weight_only=("to_q", "to_k"))
    assert check(report) == {"int4 weight-only": 2, "int8 gemm": 1}
    kernels = dict(report.engines[0].coverage.weight_only)
    assert set(kernels) == {"to_q.weight_int4", "to_k.weight_int4"}
    assert all("Int4" in how for how in kernels.values())


def test_one_timestep_a_call(captured: Callable[[str], Program], tmp_path: Path) -> None:
    folder = tmp_path / "x"
    export_program(quantised(captured("two_sites"), "w4a4"), "tensorrt", folder, one_timestep=True)
    report = build_engines(folder, archs=("sm_89",))
    check(report)
    assert set(report.engines[0].record.shapes) == {"sample"}  # the timestep has one shape


@pytest.mark.slow
def test_the_whole_bundled_model_for_the_newest_architecture(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """All are built for blocks of LDM-4, and one of them for every other model here."""
    archs = (ARCHS[-1],)
    report = build(quantised(captured("digits"), "w4a4"), tmp_path / "x", archs)
    forms = check(report)
    assert sum(forms.values()) == 97  # every convolution and linear layer of the UNet
    assert [engine.record.arch for engine in report.engines] == list(archs)
    for engine in report.engines:
        fused = [k for k in engine.layers if k.outputs and k.outputs[0].dtype == "Int8"]
        assert any({"Half", "Float"} & {tensor.dtype for tensor in kernel.inputs} for kernel in fused)
        assert engine.record.size_bytes > 5_000_000
