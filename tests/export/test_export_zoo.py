"""Every zoo model, to both targets: the export verifies itself, and here is what it must have measured."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from zoo import PLAIN, ROTATIONS, SHAPES, UNETS

from hqc.export.lowering import OUTPUT
from hqc.ops import sylvester

TARGETS = ("portable", "onnxruntime")
# float32 sums of at most 288 terms in another order, through at most 40 layers; given the codes nothing else differs.
EQUAL_CODES = 2e-6


def check(report, program) -> None:
    figures = report.verification
    assert figures.network.forced_error <= EQUAL_CODES
    assert len(figures.sites) == len(program.plan.quantised)
    if figures.sites:
        assert figures.worst.output_error <= EQUAL_CODES
        assert sum(site.codes for site in figures.sites) > 0
        # Something was quantised, so that the comparison means something.
        assert figures.network.quantisation_error > 1e-3


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [None, "w4a4", "w3a4", "w8a8", "w4a3", "w5a7"])
@pytest.mark.parametrize("model", PLAIN)
def test_plain_models(exported, model, bits, target) -> None:
    program, _, report = exported(model, bits, target)
    check(report, program)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [None, "w4a4"])
@pytest.mark.parametrize("model", UNETS)
def test_unets(exported, model, bits, target) -> None:
    program, _, report = exported(model, bits, target)
    check(report, program)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_other_rotations(exported, rotation, bits, target) -> None:
    program, _, report = exported("wide_channels", bits, target, rotation=ROTATIONS[rotation])
    check(report, program)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", SHAPES)
def test_sizes_edges_and_attention_of_other_shapes(exported, model, target) -> None:
    program, _, report = exported(model, "w4a4", target)
    check(report, program)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("opset", [21, 22, 23, 24, 25])
@pytest.mark.parametrize("model", ["two_sites", "shared_input"])
def test_opsets(exported, model, opset, target) -> None:
    program, folder, report = exported(model, "w4a4", target, opset)
    check(report, program)
    proto = onnx.load(str(folder / "model.onnx"))
    assert {o.domain: o.version for o in proto.opset_import}[""] == opset
    assert all({o.domain: o.version for o in f.opset_import} == {"": opset} for f in proto.functions)


@pytest.mark.parametrize("target", TARGETS)
def test_the_interface_is_the_programs(exported, target) -> None:
    program, folder, _ = exported("cross_attention", "w4a4", target)
    graph = onnx.load(str(folder / "model.onnx")).graph
    for spec, value in zip(program.inputs, graph.input, strict=True):
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        assert (value.name, dims) == (spec.name, list(spec.shape))
    assert [value.name for value in graph.output] == [OUTPUT]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", ["w4a4", "w3a4"])
def test_weights_of_four_bits_are_stored_once_as_int4(exported, bits, target) -> None:
    program, folder, _ = (
        exported("cross_attention", bits, target) if bits == "w4a4" else exported("two_sites", bits, target)
    )
    graph = onnx.load(str(folder / "model.onnx")).graph
    tensors = {t.name: t for t in graph.initializer}
    small = [plan for plan in program.plan.quantised if plan.weight_bits <= 4]
    assert small
    for plan in small:
        own = {n: t for n, t in tensors.items() if n.startswith(f"{plan.site}.weight")}
        (packed,) = (t for t in own.values() if len(t.dims) > 1)
        count = int(np.prod(packed.dims))
        assert packed.data_type == onnx.TensorProto.INT4
        assert len(packed.raw_data) == (count + 1) // 2
    # Nothing else is large: no folded copy of a weight under another name, nor in a Constant node.
    named = sum(len(t.raw_data) for n, t in tensors.items() if n in _names(program))
    assert sum(len(t.raw_data) for t in tensors.values()) - named < 32 * 32 * 5 + 8192
    assert all(n.op_type != "Constant" for n in graph.node)


def _names(program) -> set[str]:
    sites = [plan.site for plan in program.plan.sites]
    kinds = ("weight_packed", "weight_codes", "weight_scale", "weight_rotated_scale", "activation_scale_table")
    return set(program.state) | {f"{site}.{kind}" for site in sites for kind in kinds}


def test_portable_quantisers_avoid_the_zero_point_trap(exported) -> None:
    """onnxruntime 1.27 to 1.32 refuse an INT8 zero point before Reshape or Transpose at opset 21 and later."""
    _, folder, _ = exported("cross_attention", "w4a4", "portable")
    graph = onnx.load(str(folder / "model.onnx")).graph
    quantisers = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert quantisers
    for node in quantisers:
        assert len(node.input) == 2
        assert {a.name: a.i for a in node.attribute}["output_dtype"] == onnx.TensorProto.INT8
    producers = {n.output[0]: n for n in graph.node}
    assert all(producers[n.input[0]].op_type == "Clip" for n in quantisers)


@pytest.mark.parametrize(("model", "bits"), [("cross_attention", "w4a4"), ("two_sites", "w8a8"), ("geometry", None)])
def test_portable_uses_standard_operators_only(exported, model, bits) -> None:
    """No function, no operator on bits (OpenVINO computes those wrongly), and H as a constant of ±1."""
    _, folder, _ = exported(model, bits, "portable")
    proto = onnx.load(str(folder / "model.onnx"))
    assert not proto.functions
    assert {o.domain for o in proto.opset_import} == {""}
    assert not any(n.domain or n.op_type.startswith("Bit") for n in proto.graph.node)
    matrices = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if "hadamard" in t.name}
    assert bool(matrices) == (bits is not None)
    for name, matrix in matrices.items():
        np.testing.assert_array_equal(matrix, sylvester(int(name.removeprefix("hadamard_"))).numpy())


def test_rotations_are_shared_by_sites_that_read_one_tensor(exported) -> None:
    _, folder, _ = exported("shared_input", "w4a4", "onnxruntime")
    nodes = onnx.load(str(folder / "model.onnx")).graph.node
    assert sum(n.op_type == "MatMul" and n.input[1] == "rotation_32" for n in nodes) == 1
    assert sum(n.op_type == "MatMulIntegerToFloat" for n in nodes) == 3
    assert sum(n.op_type == "Gather" for n in nodes) == 1


def test_sites_name_their_values(exported) -> None:
    program, folder, _ = exported("geometry", "w4a4", "onnxruntime")
    nodes = onnx.load(str(folder / "model.onnx")).graph.node
    values = {name for node in nodes for name in node.output}
    # The last site's output may be the network's own.
    assert {plan.site for plan in program.plan.quantised} - values <= {program.plan.quantised[-1].site}
    assert {f"{plan.site}.codes" for plan in program.plan.quantised} <= values


def test_folder_layout(exported) -> None:
    _, folder, report = exported("two_sites", "w4a4", "onnxruntime")
    assert {p.name for p in Path(folder).iterdir()} == {"model.onnx", "manifest.json", "plan.json"}
    assert report.size_bytes == (folder / "model.onnx").stat().st_size
    assert "equal codes" in str(report)
