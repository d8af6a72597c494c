"""Activations of the `onnxruntime` target: rotated, scaled, rounded, as uint8 codes with the zero point max|q| + 1.

    image   x [N, C, H, W] -> [N, C/b, b, H·W] -> (H_b/√b)/s [N, 1, b, b] @ x -> QuantizeLinear -> Clip (uint8)
    tokens  x [N, …, C]    -> [N, 1, …·C/b, b] -> x @ (H_b/√b)/s              -> QuantizeLinear -> Clip (uint8)

Few passes over memory: the scale is folded into the rotation, rounding saturates to a byte, and the clip to the grid
runs on bytes; Max and Min with two looked-up bytes a sample where the range has a zero point. Images are rotated where
they are and transposed as bytes afterwards, a quarter of the traffic.
The scale stays outside of the rotation where a sample is too small to pay for a matrix of its own, and where sites
with different scales read one rotated tensor.
"""

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from hqc.bounds import QUANTISERS, Bounds, bounds_of
from hqc.export.attention_products import AttentionProduct
from hqc.export.builder import typed
from hqc.export.lowering import Lowering
from hqc.export.scale_bank import Form, ScaleBank, lookup_key, rotation_form, rotation_matrix
from hqc.export.shared import matrix_name
from hqc.program import Program, is_op
from hqc.sites import rotation_of

__all__ = ["IntegerState", "code_zero", "dequantize", "hadamard", "quantize", "requested_scales", "zero_point"]

ops = torch.ops.hqc
FLOAT = ir.DataType.FLOAT
_WORTH_A_MATRIX = 8


class IntegerState(Lowering):
    """What activations and products ask their lowering for, besides the graph."""

    bank: ScaleBank
    weights: dict[str, list[ir.Value]]
    code_products: Mapping[fx.Node, AttentionProduct]
    """Those within attention whose operands are codes."""
    signed: frozenset[fx.Node]
    """Quantisers whose codes are int8: second operands of such a product, as a layer's weight is."""


def zero_point(top: int) -> np.ndarray:  # type: ignore[type-arg]
    """The code of zero for a grid within -top…top."""
    return np.asarray(top + 1, dtype=np.uint8)


def code_zero(lo: IntegerState, quantiser: fx.Node) -> np.ndarray:  # type: ignore[type-arg]
    """The code of zero of a quantiser, in the type of its codes; those of a softmax are uint8 from 0."""
    if quantiser in lo.signed:
        return np.asarray(0, dtype=np.int8)
    if is_op(quantiser, ops.softmax_quantize.default):
        return np.asarray(0, dtype=np.uint8)
    return zero_point(bounds_of(quantiser, lo.program).largest)


def requested_scales(program: Program, shared: frozenset[fx.Node]) -> list[tuple[fx.Node, Form]]:
    """Every form in which the nodes of a program ask for a scale; `shared` ones are the same for the whole batch."""
    requests: list[tuple[fx.Node, Form]] = []
    for node in program.graph.nodes:
        if is_op(node, *QUANTISERS):
            requests.append((node.args[1], _quantiser_form(program, node)))
        elif is_op(node, ops.rescale.default) and node.args[1] in shared:
            requests.append((node.args[1], ("number", 1)))
        elif is_op(node, ops.rescale.default) or (
            is_op(node, ops.dequantize.default) and is_op(node.args[0], *QUANTISERS)
        ):
            requests.append((node.args[1], ("scale", len(node.meta["shape"]))))
            if node.meta.get("role") == "operand" and node.args[1] in shared:
                requests.append((node.args[1], ("number", 1)))
    return requests


def _quantiser_form(program: Program, quantiser: fx.Node) -> Form:
    x: fx.Node = quantiser.args[0]  # type: ignore[assignment]
    if _folded(program, x):
        return rotation_form(rotation_of(x))
    return "reciprocal", len(x.meta["shape"])


def _folded(program: Program, rotation: fx.Node) -> bool:
    """Whether the scale goes into the rotation: one scale for all readers, and samples that outweigh a matrix each."""
    if not is_op(rotation, ops.hadamard.default):
        return False
    readers = [reader for twin in _twins(rotation) for reader in twin.users]
    if not all(is_op(reader, *QUANTISERS) for reader in readers):
        return False
    values = math.prod(d for d in rotation.meta["shape"] if isinstance(d, int))
    if values < _WORTH_A_MATRIX * int(rotation.args[1]) ** 2:  # type: ignore[arg-type]
        return False
    scales: set[fx.Node] = {reader.args[1] for reader in readers}  # type: ignore[misc]
    keys = {lookup_key(program, scale) for scale in scales}
    return len(scales) == 1 or (len(keys) == 1 and None not in keys)


def _twins(rotation: fx.Node) -> list[fx.Node]:
    """The rotations of the same tensor by the same matrix, which become one node: every site brings its own."""
    x: fx.Node = rotation.args[0]  # type: ignore[assignment]
    return [user for user in x.users if user.target is rotation.target and user.args == rotation.args]


def hadamard(lo: IntegerState, node: fx.Node) -> ir.Value | None:
    """The rotation on its own, in torch's layout; None where the quantiser emits it together with the scale."""
    if _folded(lo.program, node):
        return None
    rotation = rotation_of(node)
    matrix = lo.builder.constant(rotation_matrix(rotation), matrix_name(rotation, "rotation"))
    rotated = _rotated(lo, node, matrix)
    return typed(lo.builder.reshape(rotated, _sample_shape(lo, node)), FLOAT)


def _sample_shape(lo: Lowering, node: fx.Node) -> list[int]:
    return [0, *(int(d) for d in lo.shape(node)[1:])]


def _rotated(lo: IntegerState, rotation: fx.Node, matrix: ir.Value) -> ir.Value:
    """The channels of x times a matrix [b, b] or [N, 1, b, b]: [N, C/b, b, H·W] for images, else [N, 1, …·C/b, b]."""
    b = lo.builder
    x, block = rotation.args[0], int(rotation.args[1])  # type: ignore[arg-type]
    if _is_image(rotation):
        groups = b.reshape(lo.value(x), [0, int(lo.shape(rotation)[1]) // block, block, -1])
        return typed(b.op("MatMul", matrix, groups), FLOAT)
    return typed(b.op("MatMul", b.reshape(lo.value(x), [0, 1, -1, block]), matrix), FLOAT)


def _is_image(rotation: fx.Node) -> bool:
    axis, rank = int(rotation.args[2]), len(rotation.meta["shape"])  # type: ignore[arg-type]
    return axis not in (-1, rank - 1)


def quantize(lo: IntegerState, node: fx.Node) -> ir.Value:
    """Codes in torch's layout: uint8 q + max|q| + 1, or int8 q."""
    b = lo.builder
    x, scale = node.args[:2]
    bounds, form, zero = bounds_of(node, lo.program), _quantiser_form(lo.program, node), code_zero(lo, node)
    dtype = ir.DataType.from_numpy(zero.dtype)
    factor = lo.bank.value(scale, form)  # type: ignore[arg-type]
    level = _rotated(lo, x, factor) if form[0].startswith("rotation") else b.op("Mul", lo.value(x), factor)  # type: ignore[arg-type]
    codes = typed(b.op("QuantizeLinear", level, b.scalar(1.0), b.constant(zero, "zero_point")), dtype)
    rank = 4 if form[0].startswith("rotation") else len(lo.shape(node))
    codes = _clipped(lo, codes, bounds, rank, zero)
    restored = typed(b.reshape(codes, _sample_shape(lo, node)), dtype)
    if "site" in node.meta and not str(restored.name).endswith(".codes"):  # sites that share codes keep the first name
        b.rename(restored, f"{node.meta['site']}.codes")
    return restored


def _clipped(lo: IntegerState, codes: ir.Value, bounds: Bounds, rank: int, zero: np.ndarray) -> ir.Value:  # type: ignore[type-arg]
    """Codes of a rank between their bounds, those of each sample where they are looked up."""
    b, dtype = lo.builder, zero.dtype
    if bounds.lookups is None:
        ends = (b.constant(np.asarray(end + int(zero), dtype), "bound") for end in (bounds.low, bounds.high))
        return typed(b.op("Clip", codes, *ends), codes.dtype)
    found = bounds.lookups
    for op, table, node in (("Max", found.lows, found.low), ("Min", found.highs, found.high)):
        stored = (table.numpy() + int(zero)).astype(dtype).reshape(-1, *[1] * (rank - 1))
        row = lo.value(node.args[2])
        picked = typed(b.op("Gather", b.constant(stored, "bound_table"), row, axis=0), codes.dtype)
        codes = typed(b.op(op, codes, picked), codes.dtype)
    return codes


def dequantize(lo: IntegerState, node: fx.Node) -> ir.Value:
    """For sites that stayed in floating point (accumulators past int32)."""
    b = lo.builder
    codes, scale = node.args
    if not is_op(codes, *QUANTISERS):
        return b.op("DequantizeLinear", lo.value(codes), lo.value(scale), axis=0, name=node.name)
    zero = b.constant(code_zero(lo, codes), "zero_point")  # type: ignore[arg-type]
    real = b.op("DequantizeLinear", lo.value(codes), b.scalar(1.0), zero)
    return b.op("Mul", real, lo.bank.value(scale, ("scale", len(lo.shape(codes)))), name=node.name)  # type: ignore[arg-type]
