"""Scales of groups of channels in standard operators, for the portable target.

    scale     [Pad →] Reshape to […, G, g, …] → Abs → ReduceMax → Max(2⁻¹⁰⁰) → Div(q)
    codes     Mul(Gather(1/s)) → Clip → QuantizeLinear(1)
    reals     DequantizeLinear(1) → Mul(Gather(s))

Gather gives every channel the scale of its group, so that a last group that is shorter needs nothing of its own; of a
weight all of it is constant. DequantizeLinear's own `block_size` is not used: not every runtime has it.
"""

import numpy as np
import onnx_ir as ir
from torch import fx

from hqc.export.builder import typed
from hqc.export.lowering import Lowering
from hqc.ops.grouped import LEAST_REACH

__all__ = ["dequantize_grouped", "dynamic_scale", "quantize_grouped"]

FLOAT, INT8 = ir.DataType.FLOAT, ir.DataType.INT8


def dynamic_scale(lo: Lowering, node: fx.Node) -> ir.Value:
    """s = max(max|x|, 2⁻¹⁰⁰)/q over the channels of a group."""
    b = lo.builder
    x, top, axis, group = node.args
    shape = lo.static_shape(x)
    at, value = int(axis) % len(shape), lo.value(x)  # type: ignore[arg-type]
    size = shape[at]
    group = min(int(group), size)  # type: ignore[arg-type]
    if missing := -size % group:
        ends = [0] * len(shape) + [missing if i == at else 0 for i in range(len(shape))]
        value = typed(b.op("Pad", value, b.ints(*ends)), FLOAT)
    split = [*shape[:at], (size + missing) // group, group, *shape[at + 1 :]]
    groups = typed(b.op("Reshape", value, b.ints(*split)), FLOAT)
    reach = typed(b.op("ReduceMax", b.op("Abs", groups), b.ints(at + 1), keepdims=0), FLOAT)
    floor = b.scalar(float(np.float32(LEAST_REACH)))
    return typed(b.op("Div", b.op("Max", reach, floor), b.scalar(float(top)), name=node.name), FLOAT)  # type: ignore[arg-type]


def quantize_grouped(lo: Lowering, node: fx.Node) -> ir.Value:
    """c = clip(round(x·(1/s)), low, high)."""
    b = lo.builder
    x, scale, low, high, axis, group = node.args
    inverse = _spread(lo, b.op("Reciprocal", lo.value(scale)), x, axis, group)
    ends = (b.scalar(float(end)) for end in (low, high))  # type: ignore[arg-type]
    clipped = b.op("Clip", b.op("Mul", lo.value(x), inverse), *ends)
    name = f"{node.meta['site']}.codes" if "site" in node.meta else node.name
    return typed(b.op("QuantizeLinear", clipped, b.scalar(1.0), output_dtype=INT8, name=name), INT8)


def dequantize_grouped(lo: Lowering, node: fx.Node) -> ir.Value:
    """x̂ = s·c."""
    b = lo.builder
    codes, scale, axis, group = node.args
    real = typed(b.op("DequantizeLinear", lo.value(codes), b.scalar(1.0)), FLOAT)
    return typed(b.op("Mul", real, _spread(lo, lo.value(scale), codes, axis, group), name=node.name), FLOAT)


def _spread(lo: Lowering, scale: ir.Value, x: object, axis: object, group: object) -> ir.Value:
    """Scales […, G, …] for every channel of x."""
    shape = lo.shape(x)
    at = int(axis) % len(shape)  # type: ignore[call-overload]
    places = np.arange(int(shape[at]), dtype=np.int64) // int(group)  # type: ignore[call-overload]
    return typed(lo.builder.op("Gather", scale, lo.builder.constant(places, "group_of_channel"), axis=at), FLOAT)
