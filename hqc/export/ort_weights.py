"""Weights of the `onnxruntime` target: INT4 in the file, an int8 matrix [K, O] in memory, by standard operators.

    stored [K/b, b, O] INT4 -> Cast(INT8) -> QLinearMatMul(H_b, ·; all scales 1) : int8 -> Reshape [K, O]
    with offsets               Cast(INT8) -> Add(offset [O]) -> …
    two digits                 Cast(INT8) -> MatMulInteger(H_b, ·) : int32 -> Cast -> Floor, … -> Cast(INT8) -> Reshape

K = kh·kw·C in the order of the columns of the product. The runtime folds the chain when a session is made; the fewer
and the narrower its steps, the less memory that takes, since the runtime keeps every intermediate until it is done.
Codes q - z of an asymmetric range of four bits span 16 numbers, but not -8…7: each channel has an offset in the file.
Where bits are mixed, channels of more bits are bytes in a tensor of their own, and a Gather gives the order back.
The chain starts with Cast because the runtime folds Cast and does not fold DequantizeLinear.
"""

import math

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from hqc.export.builder import typed
from hqc.export.lowering import Lowering
from hqc.ops import hadamard_matrix
from hqc.ops.weight_codes import DIGIT_BASE, int4_offsets, pack_int4
from hqc.program import Program, is_op
from hqc.sites import rotation_of

__all__ = ["weight_matrix"]

ops = torch.ops.hqc
LEAST_SHARE = 0.25
"""Of a weight's channels that have to fit four bits for them to be stored apart."""
INT8, INT32, INT4, FLOAT = ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT4, ir.DataType.FLOAT


def weight_matrix(lo: Lowering, weight: fx.Node, name: str) -> ir.Value:
    """The int8 matrix [K, O] of a weight expression over stored codes [O, C, …]."""
    b = lo.builder
    outputs = int(lo.shape(weight)[0])
    codes = _evaluated(lo, weight)
    matrix = typed(b.reshape(b.cast(codes, INT8), [-1, outputs], name=name), INT8)
    b.rename(matrix, name)
    return matrix


def _evaluated(lo: Lowering, weight: fx.Node) -> ir.Value:
    """A weight expression in the stored layout: whole numbers in some type."""
    b = lo.builder
    source = _stored_source(weight)
    if source is not None:
        return _stored(lo, *source, _block(weight))
    inner: fx.Node = weight.args[0]  # type: ignore[assignment]
    codes = _evaluated(lo, inner)
    if is_op(weight, ops.rotate_codes.default):
        matrix = b.constant(hadamard_matrix(rotation_of(weight)).to(torch.int8).numpy(), "hadamard")
        if any(is_op(user, ops.digit.default, ops.half.default) for user in weight.users):
            return typed(b.op("MatMulInteger", matrix, b.cast(codes, INT8)), INT32)
        # What a single int8 holds: nothing saturates, and no int32 of four times the size is left behind.
        one, zero = b.scalar(1.0), b.constant(np.asarray(0, np.int8), "zero")
        return typed(b.op("QLinearMatMul", matrix, one, zero, b.cast(codes, INT8), one, zero, one, zero), INT8)
    if is_op(weight, ops.half.default):
        real = b.cast(codes, FLOAT)
        half = typed(b.op("Floor", b.op("Mul", real, b.scalar(0.5))), FLOAT)
        return typed(b.op("Sub", real, half), FLOAT) if weight.args[1] else half
    if is_op(weight, ops.digit.default):
        real, base = b.cast(codes, FLOAT), float(DIGIT_BASE)
        high = b.op("Floor", b.op("Mul", b.op("Add", real, b.scalar(base / 2)), b.scalar(1 / base)))
        return typed(high if weight.args[1] else b.op("Sub", real, b.op("Mul", high, b.scalar(base))), FLOAT)
    return codes  # a cast, which the matrix makes itself


def _stored_source(weight: fx.Node) -> tuple[str, bool] | None:
    """(name in the state, packed) of a node that reads stored codes."""
    if weight.op == "get_attr":
        return str(weight.target), False
    if is_op(weight, ops.unpack_int4.default):
        return str(weight.args[0].target), True  # type: ignore[union-attr]
    return None


def _block(stored: fx.Node) -> int:
    """The order by which the codes are rotated later on, 1 if they are not: it decides how they lie in the file."""
    rotations = [user for user in stored.users if is_op(user, ops.rotate_codes.default)]
    return rotation_of(rotations[0]).block if rotations else 1


def _stored(lo: Lowering, name: str, packed: bool, block: int) -> ir.Value:
    """The stored codes [K/b, b, O]: an initialiser, or what makes them of one."""
    found = lo.builder.graph.initializers.get(name)
    if not packed:
        offsets, fits = int4_offsets(lo.program.state[name])
        if float(fits.float().mean()) >= LEAST_SHARE:
            return _with_offsets(lo, name, block, offsets, fits)
    return found if found is not None else lo.builder.initializer(name, _layout(lo.program, name, packed, block))


def _with_offsets(lo: Lowering, name: str, block: int, offsets: Tensor, fits: Tensor) -> ir.Value:
    """Codes that fit four bits after an offset a channel, and the bytes of the other channels."""
    b, codes = lo.builder, lo.program.state[name]
    own = offsets[fits]
    narrow = b.initializer(name, _int4(_columns_first(codes[fits], block) - own, name))
    shifted = typed(b.op("Add", b.cast(narrow, INT8), b.constant(own.numpy(), "code_offsets")), INT8)
    if bool(fits.all()):
        return shifted
    rest = f"{name}.wide"
    wide = b.initializer(rest, ir.tensor(_columns_first(codes[~fits], block).numpy(), name=rest))
    order = torch.cat([fits.nonzero(), (~fits).nonzero()]).flatten().argsort().to(torch.int32)
    both = typed(b.op("Concat", shifted, wide, axis=-1), INT8)
    return typed(b.op("Gather", both, b.constant(order.numpy(), "channel_order"), axis=2), INT8)


def _layout(program: Program, name: str, packed: bool, block: int) -> ir.TensorProtocol:
    codes = program.state[name]
    if packed:
        reader = next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == name)
        codes = ops.unpack_int4(codes, list(next(iter(reader.users)).args[1]))
    turned = _columns_first(codes, block)
    return _int4(turned, name) if packed else ir.tensor(turned.numpy(), name=name)


def _int4(codes: Tensor, name: str) -> ir.TensorProtocol:
    return ir.PackedTensor(pack_int4(codes).numpy(), INT4, shape=ir.Shape(codes.shape), name=name)


def _columns_first(codes: Tensor, block: int) -> Tensor:
    """[O, C, kh, kw] or [O, C] -> [kh·kw·C/b, b, O]."""
    outputs, channels = codes.shape[:2]
    taps = math.prod(codes.shape[2:])
    turned = codes.reshape(outputs, channels, taps).permute(2, 1, 0)
    return turned.reshape(taps * channels // block, block, outputs).contiguous()
