"""Products of codes within attention, for onnxruntime: against numpy int64, in other runs, where they stay float."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from attention_models import attention_quantised
from click.testing import CliRunner
from integer_oracle import MatMulIntegerToFloat, saturated_pair_sum
from onnx.reference import ReferenceEvaluator

from hqc.cli import main
from hqc.errors import ExportError
from hqc.export import attention_products as products
from hqc.export import export_program, ort_attention
from hqc.export.attention_products import AttentionProduct, attention_products
from hqc.export.interface import OUTPUT
from hqc.export.lowering import Tap
from hqc.export.model import onnx_from_program, save_model
from hqc.export.ort_session import open_session
from hqc.export.prepare import prepare
from hqc.export.reference import ForcedRun, verification_inputs
from hqc.export.watched import WatchedModel, heard
from hqc.program import Program
from hqc.storage import save_program

EVEN = (0.0,) * 3
GRID = np.array((0.0, 500.0, 999.0))
KINDS = [
    ("w4a4", 8, "asymmetric", False),
    ("w4a4", 4, "symmetric", False),
    ("w4a7", 8, "asymmetric", False),
    ("w4a8", 8, "symmetric", False),
    ("w4a6", 6, "asymmetric", True),
    ("w8a8", 8, "symmetric", True),
]


def feeds_of(program: Program, batch: int) -> dict[str, Any]:
    args = verification_inputs(program, batch)
    return {spec.name: arg.numpy() for spec, arg in zip(program.inputs, args, strict=True)}


def heard_in(
    program: Program, folder: Path, feeds: dict[str, Any], **options: Any
) -> tuple[dict[str, Tap], dict[str, Any]]:
    """Codes and products as ONNX Runtime computes them."""
    model, taps = onnx_from_program(prepare(program, "onnxruntime"), "onnxruntime", 21, **options)
    path = save_model(model, folder)
    with WatchedModel(path, list(taps.values())) as watched:
        names = {name for tap in taps.values() for name in (tap.codes.name, tap.output.name)}
        return dict(taps), watched.run(names, feeds)


def codes_of(tap: Tap, values: dict[str, Any]) -> np.ndarray:
    return heard(tap.codes, values).numpy().astype(np.int64) - tap.zero_point


def assert_equals_int64(program: Program, folder: Path, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    """Both products to the bit: sums of integers, each factor rounded once. Gives the codes."""
    taps, values = heard_in(program, folder, feeds)
    row = np.abs(feeds["timestep"][:, None] - GRID[None]).argmin(1)
    found = {}
    for one in attention_products(program):
        left, right = (site.site for site in one.codes)
        codes = {name: codes_of(taps[name], values) for name in (left, right)}
        other = codes[right].swapaxes(-2, -1) if right.endswith("key") else codes[right]
        sums = codes[left] @ other
        assert np.abs(sums).max() < 2**31
        scales = [program.state[f"{name}.activation_scale_table"].numpy() for name in (left, right)]
        picked = [scale[row] if len(scale) > 1 else scale for scale in scales]
        factor = (picked[0] * picked[1]).reshape(-1, 1, 1, 1)
        for name in (left, right):
            assert taps[name].joint
            np.testing.assert_array_equal(heard(taps[name].output, values).numpy(), sums.astype(np.float32) * factor)
        found |= codes
    return found


@pytest.mark.parametrize(("bits", "softmax_bits", "operands", "static"), KINDS)
def test_both_products_equal_int64(bits: str, softmax_bits: int, operands: str, static: bool, tmp_path: Path) -> None:
    program = attention_quantised(softmax_bits, operands, EVEN, bits=bits, static=static, masked=True)
    codes = assert_equals_int64(program, tmp_path, feeds_of(program, 6))
    assert len(codes) == 4
    assert all(len(np.unique(found)) > 8 for found in codes.values())


@pytest.mark.parametrize("bits", ["w4a7", "w8a8"])
def test_codes_at_their_ends_do_not_saturate(bits: str, tmp_path: Path) -> None:
    """Every code of q, k and v at an end of its range, of a softmax at 255 or 0."""
    program = attention_quantised(8, "asymmetric", EVEN, bits=bits)
    state = dict(program.state)
    for name, tensor in state.items():
        if "attention_" in name and name.endswith("scale_table"):
            state[name] = tensor * 1e-3
    feeds = feeds_of(program, 4)
    feeds["sample"] = np.full_like(feeds["sample"], 50.0)
    codes = assert_equals_int64(program.evolve(state=state), tmp_path, feeds)
    for name, found in codes.items():
        ends = (found == found.min(axis=(1, 2, 3), keepdims=True)) | (found == found.max(axis=(1, 2, 3), keepdims=True))
        assert ends.mean() > 0.95, name
        assert np.abs(found).max() >= 64, name


def only_product(program: Program, which: int) -> AttentionProduct:
    return list(attention_products(program))[which]


@pytest.mark.parametrize("which", [0, 1], ids=["scores", "values"])
@pytest.mark.parametrize(("bits", "signed"), [("w4a4", True), ("w4a6", True), ("w4a8", False)])
def test_int8_only_where_no_pair_of_products_leaves_int16(bits: str, signed: bool, which: int) -> None:
    """The worst codes of both operands, added as x86 without VNNI adds u8×s8: what is int8 loses nothing."""
    program = attention_quantised(8, "asymmetric", EVEN, bits=bits)
    product = only_product(program, which)
    left, right = product.codes
    largest = 255 if which else 2 * left.bounds.largest + 1
    codes, other = np.full((1, 2), largest), np.full((2, 1), right.bounds.largest)
    lost = not np.array_equal(saturated_pair_sum(codes, other), codes @ other)
    assert product.signed == signed
    assert lost == (not signed)
    types = {onnx.TensorProto.UINT8: False, onnx.TensorProto.INT8: True}
    model, taps = onnx_from_program(prepare(program, "onnxruntime"), "onnxruntime", 21)
    value = next(v for v in model.graph if v.outputs[0].name == taps[right.site].codes.name).outputs[0]
    assert types[int(value.dtype)] == signed


def test_the_reference_evaluator_and_every_optimisation_level_agree(tmp_path: Path) -> None:
    program = attention_quantised(8, "asymmetric", EVEN, bits="w4a5", masked=True)
    report = export_program(program, "onnxruntime", tmp_path / "x")
    assert report.verification.network.forced_error < 1e-6
    _, taps = onnx_from_program(prepare(program, "onnxruntime"), "onnxruntime", 21)
    proto, args = onnx.load(str(tmp_path / "x/model.onnx")), verification_inputs(program, 4)
    kinds = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
    names = sorted({tap.codes.name for tap in taps.values()})
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, kinds[name], None) for name in names)
    feeds = feeds_of(program, 4)
    output, *found = ReferenceEvaluator(proto, new_ops=[MatMulIntegerToFloat]).run([OUTPUT, *names], feeds)
    values = dict(zip(names, (np.asarray(v) for v in found), strict=True))
    forced = ForcedRun(program, {site: torch.from_numpy(codes_of(tap, values)) for site, tap in taps.items()})
    torch.testing.assert_close(torch.from_numpy(output), forced.run(*args), rtol=1e-5, atol=1e-5)
    assert max(forced.distance.values()) <= 1e-3
    for level in ("disabled", "basic", "extended", "all"):
        session = open_session(tmp_path / "x/model.onnx", threads=1, optimisation=level)
        np.testing.assert_allclose(session.run(None, feeds)[0], output, rtol=1e-5, atol=1e-5)


def operators(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(folder / "model.onnx")).graph.node]


def test_no_real_operand_is_left(tmp_path: Path) -> None:
    """Scales of a single row are factors of the product itself; others are multiplied, and the product by them."""
    found = {}
    for static in (True, False):
        program = attention_quantised(8, "asymmetric", EVEN, static=static)
        export_program(program, "onnxruntime", tmp_path / str(static))
        found[static] = operators(tmp_path / str(static))
        assert found[static].count("MatMulIntegerToFloat") == 4 + 2
        assert not {"MatMul", "DequantizeLinear"} & set(found[static])
    assert found[False].count("Mul") == found[True].count("Mul") + 2 * 2


@pytest.mark.parametrize("part", ["query", "value"])
def test_a_product_past_int32_stays_float_and_is_said(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over 12 keys reach 12·255·7 here, over 16 channels 16·15·7: q as uint8, k and v as int8."""
    limit = 16 * 15 * 7 if part == "value" else 1
    monkeypatch.setattr(products, "_INT32_LIMIT", limit + 1)
    program = attention_quantised(8, "symmetric", EVEN)
    report = export_program(program, "onnxruntime", tmp_path / "x")
    integers = 1 if part == "value" else 0
    assert report.attention.startswith(f"1 with {integers} of 2 products of integers; ")
    assert f"1 of floats: its sums reach {12 * 255 * 7}, past int32" in report.attention
    assert operators(tmp_path / "x").count("MatMulIntegerToFloat") == 4 + integers


@pytest.mark.parametrize("part", ["query", "softmax"])
def test_verification_sees_a_wrong_product(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right codes whose product takes another zero for that of either operand: found there, and nothing is written."""
    monkeypatch.setattr(ort_attention, "_zero", lambda lo, site: lo.builder.constant(np.uint8(3), "zero"))
    monkeypatch.setattr(AttentionProduct, "signed", property(lambda self: False))
    program = attention_quantised(8, "asymmetric", EVEN)
    with pytest.raises(
        ExportError, match=rf"attention_{part}: the output differs by \d\.\de.\d\d relative on equal codes"
    ):
        export_program(program, "onnxruntime", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_explain_counts_them(tmp_path: Path) -> None:
    save_program(attention_quantised(8, "asymmetric", EVEN), tmp_path / "x.hqc")
    arguments = ["explain", str(tmp_path / "x.hqc"), "--target", "onnxruntime"]
    printed = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert printed.exit_code == 0
    assert "attention 1 with 2 of 2 products of integers\n" in printed.stdout
    data = json.loads(CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert data["attention"] == "1 with 2 of 2 products of integers"


def test_an_integer_program_exports_to_the_same_file(tmp_path: Path) -> None:
    program = attention_quantised(8, "asymmetric", EVEN)
    export_program(program, "onnxruntime", tmp_path / "x")
    export_program(prepare(program, "onnxruntime"), "onnxruntime", tmp_path / "again")
    assert (tmp_path / "again/model.onnx").read_bytes() == (tmp_path / "x/model.onnx").read_bytes()
