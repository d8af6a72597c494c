"""What an export writes, refuses and replaces; and that its verification finds faults that were put in."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch

from hqc.errors import ArtefactError, ExportError
from hqc.export import export_program
from hqc.export.model import onnx_from_program, save_model
from hqc.export.ort_session import open_session
from hqc.export.prepare import prepare
from hqc.export.verification import verify_export
from hqc.program import copy_graph
from hqc.storage import check_manifest


def test_manifest_and_plan(exported) -> None:
    program, folder, report = exported("two_sites", "w4a4", "onnxruntime")
    manifest = check_manifest(folder, "hqc-export")
    assert (manifest["target"], manifest["opset"], manifest["stage"]) == ("onnxruntime", 21, "quantised")
    assert manifest["plan"]["quantised"] == 2
    assert manifest["plan"]["bits"] == "w4a4"
    assert manifest["verification"] == json.loads(json.dumps(report.verification.to_dict()))
    assert manifest["inputs"][0]["shape"] == list(program.inputs[0].shape)
    assert len(json.loads((folder / "plan.json").read_text())["sites"]) == 2


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_external_data(exported, quantised, captured, tmp_path, target) -> None:
    """Weights beside the model, named relative to it; the same results from another place on disk."""
    _, plain, _ = exported("wide_channels", "w4a4", target)
    program = quantised("wide_channels", "w4a4")
    export_program(program, target, tmp_path / "a", external_data_bytes=0, float_program=captured("wide_channels"))
    moved = (tmp_path / "a").rename(tmp_path / "b")
    proto = onnx.load(str(moved / "model.onnx"), load_external_data=False)
    places = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
    assert places == {"model.onnx.data"}
    assert set(check_manifest(moved, "hqc-export")["files"]) == {"model.onnx", "model.onnx.data", "plan.json"}
    feeds = {s.name: a.numpy() for s, a in zip(program.inputs, program.example_inputs(2), strict=True)}
    outputs = [open_session(f / "model.onnx", threads=1).run(None, feeds)[0] for f in (plain, moved)]
    assert np.array_equal(*outputs)


def test_the_same_input_gives_the_same_bytes(exported, quantised, captured, tmp_path) -> None:
    _, folder, _ = exported("geometry", "w4a4", "onnxruntime")
    export_program(quantised("geometry", "w4a4"), "onnxruntime", tmp_path / "x", float_program=captured("geometry"))
    assert (tmp_path / "x" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


def test_an_existing_folder_needs_force(captured, tmp_path) -> None:
    program, folder = captured("two_sites"), tmp_path / "out"
    export_program(program, "portable", folder)
    with pytest.raises(ArtefactError, match="already exists"):
        export_program(program, "portable", folder)
    assert export_program(program, "onnxruntime", folder, force=True).target == "onnxruntime"
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtefactError, match="not written by hqc"):
        export_program(program, "portable", tmp_path / "other", force=True)


@pytest.mark.parametrize(
    ("options", "message"), [({"opset": 20}, "opset 20"), ({"opset": 26}, "opset 26"), ({"target": "tpu"}, "tpu")]
)
def test_refusals(captured, tmp_path, options, message) -> None:
    with pytest.raises(ExportError, match=message):
        export_program(captured("two_sites"), **{"target": "portable", "folder": tmp_path / "x", **options})
    assert list(tmp_path.iterdir()) == []


def test_operators_without_translation_are_all_named(captured, tmp_path) -> None:
    program = captured("two_sites")
    graph = copy_graph(program.graph)
    output = next(node for node in graph.nodes if node.op == "output")
    last = output.args[0]
    with graph.inserting_before(output):
        for target in (torch.ops.aten.erf.default, torch.ops.aten.lgamma.default):
            last = graph.call_function(target, (last,))
    output.args = (last,)
    with pytest.raises(ExportError, match=r"aten\.erf\.default, aten\.lgamma\.default"):
        export_program(program.evolve(graph=graph), "portable", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_rotated_programs_are_not_portable(quantised, tmp_path) -> None:
    integer = prepare(quantised("two_sites", "w4a4"), "onnxruntime")
    with pytest.raises(ExportError, match="rotated already"):
        export_program(integer, "portable", tmp_path / "x")


def test_unrotated_packed_programs_are_not_for_onnxruntime(quantised, tmp_path) -> None:
    frozen = prepare(quantised("two_sites", "w4a4"), "portable")
    with pytest.raises(ExportError, match="packed but not rotated"):
        export_program(frozen, "onnxruntime", tmp_path / "x")


# ---- faults that verification must find ----------------------------------------------------------------------------


def _scale_weight(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("conv.weight") and tensor.name.endswith("scale"):
            tensor.raw_data = (1.001 * np.frombuffer(tensor.raw_data, np.float32)).astype(np.float32).tobytes()


def _scale_activation(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name == "conv.activation_scale_table":
            tensor.raw_data = (1.01 * np.frombuffer(tensor.raw_data, np.float32)).astype(np.float32).tobytes()


def _flip_a_code(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name == "conv.weight_packed":
            tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]


def _wrong_activation(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "Tanh"


def _wrong_input(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "nothing"


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_scale_weight, "conv: the output differs"),
        (_scale_activation, "conv: .* codes differ away from a rounding boundary"),
        (_flip_a_code, "conv: the output differs"),
        (_wrong_activation, "past its rounding boundary"),
        (_wrong_input, "not valid ONNX"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faults_are_found(quantised, tmp_path, target, fault, message) -> None:
    program = quantised("two_sites", "w4a4")
    model, taps = onnx_from_program(prepare(program, target), target, 21)
    path = save_model(model, tmp_path)
    assert verify_export(path, taps, program).sites
    proto = onnx.load(str(path))
    before = proto.SerializeToString()
    fault(proto)
    assert proto.SerializeToString() != before
    onnx.save(proto, str(path))
    with pytest.raises(ExportError, match=message):
        verify_export(path, taps, program)


def test_weights_that_could_saturate_are_refused(quantised, tmp_path) -> None:
    program = quantised("two_sites", "w8a8")
    model, taps = onnx_from_program(prepare(program, "onnxruntime"), "onnxruntime", 21)
    path = save_model(model, tmp_path)
    wide = {site: dataclasses.replace(tap, largest_code=4096) for site, tap in taps.items()}
    with pytest.raises(ExportError, match="saturate"):
        verify_export(path, wide, program)


def test_nothing_is_left_when_verification_fails(quantised, tmp_path, monkeypatch) -> None:
    def fail(*args, **options):
        raise ExportError("export verification", "out of bounds", "Report a bug.")

    monkeypatch.setattr("hqc.export.artefact.verify_export", fail)
    with pytest.raises(ExportError):
        export_program(quantised("two_sites", "w4a4"), "portable", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_without_a_float_program_the_quantisers_are_bypassed(quantised, captured, tmp_path) -> None:
    program = quantised("two_sites", "w4a4")
    with_float = export_program(program, "onnxruntime", tmp_path / "a", float_program=captured("two_sites"))
    without = export_program(program, "onnxruntime", tmp_path / "b")
    frozen = export_program(prepare(program, "portable"), "portable", tmp_path / "c")
    errors = [r.verification.network.quantisation_error for r in (with_float, without, frozen)]
    assert all(error > 1e-3 for error in errors)
    rotated = export_program(prepare(program, "onnxruntime"), "onnxruntime", tmp_path / "d")
    assert rotated.verification.network.quantisation_error is None


def test_only_large_tensors_go_beside_the_model(captured, quantised, tmp_path) -> None:
    """Shape inference needs the split sizes of a scale bank, which outgrow 256 bytes from 33 sites on."""
    program = quantised("cross_attention", "w4a4")
    folder = tmp_path / "beside"
    report = export_program(
        program, "onnxruntime", folder, float_program=captured("cross_attention"), external_data_bytes=1
    )
    tensors = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.initializer
    moved = [t for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL]
    assert moved
    assert all(len(t.raw_data) <= 2**14 for t in tensors)
    assert all(t.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.INT8, onnx.TensorProto.FLOAT) for t in moved)
    assert report.verification.network.forced_error <= 1e-4
