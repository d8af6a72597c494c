"""`--functions`: rotations as nodes of a model-local function, for tools that have a kernel of their own for it."""

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
from integer_oracle import regular_signs, signs
from onnx.reference import ReferenceEvaluator
from zoo import ROTATIONS

from hqc.errors import ExportError
from hqc.evaluation.export_errors import compare_export
from hqc.export import export_program
from hqc.export.functions import hadamard_function
from hqc.export.ort_session import open_session
from hqc.export.reference import verification_inputs

# float32 sums in another order, through at most 40 layers.
EQUAL_CODES = 5e-6


def relative(found, wanted) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("model", "ranges"), [("shared_input", "symmetric"), ("geometry", "symmetric"), ("geometry", "asymmetric")]
)
def test_the_function_equals_the_constant(exported, tmp_path, model, ranges) -> None:
    program, folder, _ = exported(model, "w4a4", "portable", ranges=ranges)
    assert_function_equals_constant(program, folder, tmp_path)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_the_function_has_every_kind_and_order(exported, tmp_path, rotation) -> None:
    program, folder, _ = exported("wide_channels", "w4a4", "portable", rotation=ROTATIONS[rotation])
    assert_function_equals_constant(program, folder, tmp_path)


@pytest.mark.parametrize(("regular", "orders"), [(0, (8, 16, 32, 64, 128, 256)), (1, (4, 8, 16, 32, 64, 128, 256))])
def test_the_body_makes_the_matrix(regular: int, orders: tuple[int, ...]) -> None:
    """Ĥ of the identity, by ONNX's reference evaluator."""
    for order in orders:
        node = onnx.helper.make_node("Hadamard", ["x"], ["y"], domain="hqc", block=order, axis=-1, regular=regular)
        types = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [order, order]) for n in "xy"]
        function = ir.serde.serialize_function(hadamard_function(21))
        imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("hqc", 1)]
        graph = onnx.helper.make_graph([node], "g", types[:1], types[1:])
        model = onnx.helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)
        (found,) = ReferenceEvaluator(model).run(None, {"x": np.eye(order, dtype=np.float32)})
        wanted = (regular_signs if regular else signs)(order) * np.float32(order**-0.5)
        np.testing.assert_array_equal(found, wanted.astype(np.float32))


def assert_function_equals_constant(program, folder, tmp_path) -> None:
    export_program(program, "portable", tmp_path / "x", functions=True)
    proto = onnx.load(str(tmp_path / "x" / "model.onnx"))
    assert {(n.domain, n.op_type) for n in proto.graph.node if n.domain} == {("hqc", "Hadamard")}
    assert [(f.domain, f.name) for f in proto.functions] == [("hqc", "Hadamard")]
    inlined = onnx.inliner.inline_local_functions(proto)
    assert not inlined.functions
    onnx.save(inlined, str(tmp_path / "inlined.onnx"))
    feeds = {s.name: a.numpy() for s, a in zip(program.inputs, verification_inputs(program, 4), strict=True)}
    files = (folder / "model.onnx", tmp_path / "x" / "model.onnx", tmp_path / "inlined.onnx")
    constant, function, inline = (open_session(file, threads=1).run(None, feeds)[0] for file in files)
    assert relative(function, constant) <= EQUAL_CODES
    assert relative(inline, constant) <= EQUAL_CODES


def test_compare_finds_the_graph_of_either_form(exported, tmp_path) -> None:
    """The manifest says which one it is, so that the inputs of sites are known too."""
    program, folder, _ = exported("two_sites", "w4a4", "portable")
    export_program(program, "portable", tmp_path / "x", functions=True)
    for export in (folder, tmp_path / "x"):
        found = compare_export(program, export, verification_inputs(program, 2))
        assert not found.note
        assert all(site.made is not None for site in found.sites)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_other_targets_take_no_functions(exported, tmp_path, target) -> None:
    program, _, _ = exported("two_sites", "w4a4", "portable")
    with pytest.raises(ExportError, match=f"target {target}: takes no functions"):
        export_program(program, target, tmp_path / "x", functions=True)
    assert not (tmp_path / "x").exists()
