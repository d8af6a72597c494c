"""The portable file under OpenVINO, where that is installed: it loads, and given its codes torch says the same."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from zoo import PLAIN, ROTATIONS, SHAPES

from hqc.export.model import onnx_from_program
from hqc.export.prepare import prepare
from hqc.export.reference import ForcedRun, verification_inputs
from hqc.export.watched import heard

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'hqc[openvino]'")

# float32 sums in another order, through at most 40 layers, the codes being equal.
EQUAL_CODES = 5e-6
# Of its own, OpenVINO multiplies in bfloat16 where the CPU does, and quantises the inputs of linear layers once more.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_NUM_THREADS": 1}


def run(model: Path, feeds):
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(model)), "CPU", EXACT)
    return [np.array(value) for value in compiled(feeds).values()]


def relative(found, wanted) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def inputs(program):
    args = verification_inputs(program, 4)
    return args, {s.name: a.numpy() for s, a in zip(program.inputs, args, strict=True)}


@pytest.mark.parametrize(
    ("model", "bits", "ranges"),
    [
        *((name, "w4a4", "symmetric") for name in (*PLAIN, *SHAPES)),
        ("geometry", "w8a8", "symmetric"),
        *((name, "w4a4", "asymmetric") for name in ("geometry", "cross_attention")),
    ],
)
def test_openvino_equals_torch_given_its_codes(exported, tmp_path, model, bits, ranges) -> None:
    program, folder, _ = exported(model, bits, "portable", ranges=ranges)
    assert_openvino_equals_torch(program, folder, tmp_path)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_openvino_equals_torch_with_other_rotations(exported, tmp_path, rotation) -> None:
    program, folder, _ = exported("wide_channels", "w4a4", "portable", rotation=ROTATIONS[rotation])
    assert_openvino_equals_torch(program, folder, tmp_path)


def assert_openvino_equals_torch(program, folder, tmp_path) -> None:
    """Torch follows OpenVINO's codes, so that one flipped code cannot hide or feign a fault."""
    _, taps = onnx_from_program(prepare(program, "portable"), "portable", 21)
    args, feeds = inputs(program)
    proto = onnx.load(str(folder / "model.onnx"))
    names = sorted({tap.codes.name for tap in taps.values()})
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, None) for name in names)
    onnx.save(proto, str(tmp_path / "watched.onnx"))
    output, *found = run(tmp_path / "watched.onnx", feeds)
    values = dict(zip(names, found, strict=True))
    forced = ForcedRun(program, {site: heard(tap.codes, values).to(torch.int16) for site, tap in taps.items()})
    wanted = forced.run(*args).numpy()
    assert relative(output, wanted) <= EQUAL_CODES
    assert max(forced.distance.values()) <= 1e-3  # of a step past a rounding boundary
    # The file itself, whose nodes OpenVINO may fuse where nobody watches.
    assert relative(run(folder / "model.onnx", feeds)[0], output) <= EQUAL_CODES


@pytest.mark.parametrize("model", ["cross_attention", "geometry"])
def test_a_float_export_equals_torch(exported, model) -> None:
    program, folder, _ = exported(model, None, "portable")
    args, feeds = inputs(program)
    assert relative(run(folder / "model.onnx", feeds)[0], program.module()(*args).numpy()) <= EQUAL_CODES
