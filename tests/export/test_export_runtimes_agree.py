"""The same file under other implementations: ONNX's reference evaluator, onnxruntime's four levels."""

import numpy as np
import onnx
import pytest
import torch
from integer_oracle import MatMulIntegerToFloat
from onnx.reference import ReferenceEvaluator
from zoo import ROTATIONS

from hqc.export.lowering import OUTPUT
from hqc.export.model import onnx_from_program
from hqc.export.ort_session import open_session
from hqc.export.prepare import prepare
from hqc.export.reference import ForcedRun, verification_inputs
from hqc.export.watched import heard

TARGETS = ("portable", "onnxruntime")
# float32 sums in another order, through at most 40 layers, the codes being equal.
EQUAL_CODES = 5e-6
# Without equal codes: a value on a rounding boundary may fall either way; see `hqc.export.verification`.
PARTED = np.sqrt(2)


def relative(found, wanted) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def inputs(program, batch=4):
    args = verification_inputs(program, batch)
    return args, {s.name: a.numpy() for s, a in zip(program.inputs, args, strict=True)}


# The evaluator takes seconds for a UNet: those in one target each.
@pytest.mark.parametrize(
    ("model", "bits", "target"),
    [
        *(
            (*one, t)
            for one in (("shared_input", "w4a4"), ("two_sites", "w8a8"), ("geometry", "w3a4"))
            for t in TARGETS
        ),
        ("without_attention", "w4a4", "portable"),
        ("seamless", "w4a4", "portable"),
        ("odd_sides", "w4a4", "onnxruntime"),
        ("plain_attention", "w4a4", "onnxruntime"),
    ],
)
def test_reference_evaluator_equals_torch(exported, model, bits, target) -> None:
    program, folder, _ = exported(model, bits, target)
    assert_evaluator_equals_torch(program, folder, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_reference_evaluator_equals_torch_with_other_rotations(exported, rotation, target) -> None:
    program, folder, _ = exported("wide_channels", "w4a4", target, rotation=ROTATIONS[rotation])
    assert_evaluator_equals_torch(program, folder, target)


def assert_evaluator_equals_torch(program, folder, target) -> None:
    """Torch follows the evaluator's codes, so that one flipped code cannot hide or feign a fault."""
    _, taps = onnx_from_program(prepare(program, target), target, 21)
    proto = onnx.load(str(folder / "model.onnx"))
    args, feeds = inputs(program, 2)
    kind = onnx.TensorProto.UINT8 if target == "onnxruntime" else onnx.TensorProto.INT8
    names = sorted({tap.codes.name for tap in taps.values()})
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    output, *found = ReferenceEvaluator(proto, new_ops=[MatMulIntegerToFloat]).run([OUTPUT, *names], feeds)
    values = dict(zip(names, (np.asarray(v) for v in found), strict=True))
    codes = {site: heard(tap.codes, values).to(torch.int16) - tap.zero_point for site, tap in taps.items()}
    forced = ForcedRun(program, codes)
    wanted = forced.run(*args).numpy()
    assert relative(output, wanted) <= EQUAL_CODES
    assert max(forced.distance.values()) <= 1e-3  # of a step past a rounding boundary


@pytest.mark.parametrize("target", TARGETS)
def test_optimisation_levels_agree(exported, target) -> None:
    assert_levels_agree(*exported("cross_attention", "w4a4", target))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_optimisation_levels_agree_with_other_rotations(exported, rotation, target) -> None:
    assert_levels_agree(*exported("wide_channels", "w4a4", target, rotation=ROTATIONS[rotation]))


def assert_levels_agree(program, folder, report) -> None:
    args, feeds = inputs(program, 8)
    wanted = program.module()(*args).numpy()
    step = report.verification.network.quantisation_error
    for level in ("disabled", "basic", "extended", "all"):
        found = open_session(folder / "model.onnx", threads=1, optimisation=level).run(None, feeds)[0]
        errors = sorted(relative(a, b) for a, b in zip(found, wanted, strict=True))
        assert errors[len(errors) // 2] <= EQUAL_CODES, level
        assert errors[-1] <= PARTED * step, level


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", ["two_sites", "cross_attention"])
def test_a_mixed_batch_equals_its_samples_one_by_one(exported, model, target) -> None:
    """In onnxruntime and in torch. A matrix product may round by its size, hence the median and the bound on flips."""
    program, folder, report = exported(model, "w4a4", target)
    _, feeds = inputs(program, 8)
    assert len(set(feeds["timestep"].tolist())) > 2
    session, module = open_session(folder / "model.onnx", threads=1), program.module()
    runs = {
        "onnxruntime": lambda f: session.run(None, f)[0],
        "torch": lambda f: module(*(torch.from_numpy(f[s.name]) for s in program.inputs)).numpy(),
    }
    for name, run in runs.items():
        together = run(feeds)
        alone = [run({k: v[i : i + 1] for k, v in feeds.items()})[0] for i in range(8)]
        errors = sorted(relative(a, b) for a, b in zip(together, alone, strict=True))
        assert errors[4] <= EQUAL_CODES, name
        assert errors[-1] <= PARTED * report.verification.network.quantisation_error, name
    # The timestep matters: with one timestep for all, the other samples change.
    same = feeds | {"timestep": np.full_like(feeds["timestep"], feeds["timestep"][0])}
    assert relative(runs["onnxruntime"](same)[1], runs["onnxruntime"](feeds)[1]) > 1e-3


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size(exported, batch) -> None:
    program, folder, _ = exported("awkward", "w4a4", "onnxruntime")
    args, feeds = inputs(program, batch)
    found = open_session(folder / "model.onnx", threads=1).run(None, feeds)[0]
    assert relative(found, program.module()(*args).numpy()) <= EQUAL_CODES
