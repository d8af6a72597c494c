"""Activations of the `tensorrt` target: rotated, scaled by the sample's timestep, clipped, rounded to int8.

    image   x [N, C, H, W] -> Conv(±H tiled [C, b, 1, 1], group C/b)          -> ·g[t] -> Clip -> QuantizeLinear(s₀)
    tokens  x [N, …, C]    -> Reshape [N, …, C/b, b] -> @ H [b, b]            -> ·g[t] -> Clip -> Reshape -> Q(s₀)
    plugin  x              -> HadamardQuantize(x, 1/s[t])                     (rotated sites, plugins = qdp)
                              HadamardQuantizeBounded(x, [1/s, low, high][t]) where the timestep picks z

    g[t] = s₀/(s[t]·√b) as a table in float32,   Clip to [qmin·s₀, qmax·s₀]

The matrix holds ±1 and the factor 1/√b goes into the table: ±1 is exact in every float type, TF32 among them, in which
TensorRT multiplies float32 by default; 1/√32 is not. s₀ is a power of two, so that Q divides without rounding.
A range that is not symmetric is only another Clip: codes q − z of an asymmetric quantiser of at most 7 bits have zero
at 0 and need no zero point. Where the timestep picks z, the Clip is a Max and a Min with looked-up bounds times s₀.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import fx

from hqc.bounds import QUANTISERS, bounds_of
from hqc.export.builder import HQC_DOMAIN, typed
from hqc.export.lowering import Lowering, batch_dims
from hqc.export.shared import matrix_name, signed_sums, signs
from hqc.export.tensorrt.forms import LayerForm, scale_table
from hqc.export.tensorrt.options import TensorRtOptions
from hqc.program import BATCH, is_op
from hqc.rotations import Rotation
from hqc.sites import rotation_of

__all__ = ["TensorRtState", "dequantized", "hadamard", "int8_pair", "looked_up", "quantize"]

ops = torch.ops.hqc
FLOAT, INT8 = ir.DataType.FLOAT, ir.DataType.INT8


class TensorRtState(Lowering):
    """What activations and products ask their lowering for, besides the graph."""

    options: TensorRtOptions
    forms: dict[str, LayerForm]


def looked_up(lo: TensorRtState, scale: Any, values: NDArray[np.float32], rank: int, name: str) -> ir.Value:
    """A table [T, …] at the timestep's row, [N, …]; shaped to multiply a tensor of some rank: [N, 1, …]."""
    table = lo.builder.constant(values.astype(np.float32).reshape(*values.shape, *[1] * (rank - 1)), "table")
    row = lo.value(scale.args[2])
    return typed(lo.builder.op("Gather", table, row, axis=0, name=name), FLOAT)


def static_zero(lo: Lowering) -> ir.Value:
    """The zero point that TensorRT wants to see, a constant 0."""
    return lo.builder.constant(np.asarray(0, np.int8), "zero_point")


def dequantized(lo: TensorRtState, codes: ir.Value, static: float, name: str) -> ir.Value:
    """DequantizeLinear(codes, s₀, 0) in float32."""
    pair = (codes, lo.builder.scalar(static), static_zero(lo))
    return typed(lo.builder.op("DequantizeLinear", *pair, name=name), FLOAT)


def int8_pair(
    lo: TensorRtState, weight: NDArray[np.int8], scale: NDArray[np.float32], axis: int, name: str
) -> ir.Value:
    """DequantizeLinear(weight, s_w per channel, zeros per channel): an operand of an int8 product.

    The zero points are written out, one a channel: ONNX Runtime misreads a per-channel scale without them.
    """
    b = lo.builder
    codes = b.initializer(name, ir.tensor(weight, name=name))
    factors = b.constant(scale.astype(np.float32), f"{name}_scale")
    zeros = b.constant(np.zeros(scale.shape, np.int8), "zero_points")
    return typed(b.op("DequantizeLinear", codes, factors, zeros, axis=axis, name=f"{name}.real"), FLOAT)


# ---- rotation ------------------------------------------------------------------------------------------------------


def hadamard(lo: TensorRtState, node: fx.Node) -> ir.Value | None:
    """A rotation whose value someone else than a quantiser reads; quantisers rotate for themselves."""
    if all(is_op(user, *QUANTISERS) for user in node.users):
        return None
    factor = lo.builder.scalar(float(np.float32(rotation_of(node).block ** -0.5)))
    return typed(lo.builder.op("Mul", _rotated(lo, node, node.name), factor, name=node.name), FLOAT, lo.shape(node))


def _rotated(lo: TensorRtState, rotation: fx.Node, name: str) -> ir.Value:
    """±H·x without the factor 1/√b, in torch's layout."""
    x, turn = lo.value(rotation.args[0]), rotation_of(rotation)
    shape = lo.static_shape(rotation)
    image = len(shape) == 4 and int(rotation.args[2]) % 4 == 1  # type: ignore[arg-type]
    if (lo.options.image_rotation if image else lo.options.token_rotation) == "matmul":
        return signed_sums(lo, rotation, name)
    if image:
        return _conv(lo, x, turn, shape[1], name)
    # One pixel a token: [N·…, C, 1, 1].
    pixels = _reshaped(lo, x, [-1, shape[-1], 1, 1])
    return _reshaped(lo, _conv(lo, pixels, turn, shape[-1], name), shape)


def _reshaped(lo: TensorRtState, x: ir.Value, shape: list[int]) -> ir.Value:
    """A Reshape of x itself: the builder's would start at what x was reshaped from, and leave nothing to listen to."""
    return typed(lo.builder.op("Reshape", x, lo.builder.ints(*shape)), FLOAT)


def _conv(lo: TensorRtState, x: ir.Value, rotation: Rotation, channels: int, name: str) -> ir.Value:
    groups = channels // rotation.block
    tiled = np.tile(signs(rotation), (groups, 1)).reshape(channels, rotation.block, 1, 1)
    weight = lo.builder.constant(tiled, matrix_name(rotation, f"hadamard_{channels}"))
    return typed(lo.builder.op("Conv", x, weight, group=groups, kernel_shape=[1, 1], name=f"{name}.rotated"), FLOAT)


# ---- quantiser -----------------------------------------------------------------------------------------------------


def quantize(lo: TensorRtState, node: fx.Node) -> ir.Value:
    """The codes of a quantiser in torch's layout: int8, or whole float32 numbers where no integer product follows."""
    site = str(node.meta["site"])
    x, scale = node.args[:2]
    rotation = rotation_of(x) if is_op(x, ops.hadamard.default) else None  # type: ignore[arg-type]
    form = lo.forms[site]
    table = scale_table(lo.program, scale, site).numpy()
    if form.rotation == "plugin":
        return _plugin(lo, node, table)
    b, static = lo.builder, form.static_scale or 1.0
    values = np.float32(1) / table * np.float32(static * (rotation.block if rotation else 1) ** -0.5)
    factor = looked_up(lo, scale, values.astype(np.float32), len(lo.shape(node)), f"{site}.input_scale")
    rotated = _rotated(lo, x, site) if rotation else lo.value(x)  # type: ignore[arg-type]
    level = typed(b.op("Mul", rotated, factor, name=f"{site}.level"), FLOAT)
    clipped = _clipped(lo, node, level, static)
    if not form.integer:
        return typed(b.op("Round", clipped, name=f"{site}.codes"), FLOAT, lo.shape(node))
    codes = b.op("QuantizeLinear", clipped, b.scalar(static), static_zero(lo), name=f"{site}.codes")
    return typed(codes, INT8, lo.shape(node))


def _clipped(lo: TensorRtState, node: fx.Node, level: ir.Value, static: float) -> ir.Value:
    """Levels times s₀ between the bounds of the codes."""
    b, site, bounds = lo.builder, str(node.meta["site"]), bounds_of(node, lo.program)
    found = bounds.lookups
    if found is None:
        ends = (b.scalar(bound * static) for bound in (bounds.low, bounds.high))
        return typed(b.op("Clip", level, *ends, name=f"{site}.clipped"), FLOAT)
    rank = len(lo.shape(node))
    low, high = (
        looked_up(lo, bound, table.numpy() * np.float32(static), rank, f"{site}.{name}")
        for bound, table, name in ((found.low, found.lows, "least_level"), (found.high, found.highs, "largest_level"))
    )
    return typed(b.op("Min", typed(b.op("Max", level, low), FLOAT), high, name=f"{site}.clipped"), FLOAT)


def _plugin(lo: TensorRtState, node: fx.Node, table: NDArray[np.float32]) -> ir.Value:
    b = lo.builder
    rotation, scale = node.args[:2]
    block, regular = rotation_of(rotation)  # type: ignore[arg-type]
    image = len(lo.shape(node)) == 4 and int(rotation.args[2]) % 4 == 1  # type: ignore[union-attr, arg-type]
    bounds, numbers = bounds_of(node, lo.program), {}
    values = np.float32(1) / table
    if bounds.lookups is None:
        op, numbers = "HadamardQuantize", {"low": bounds.low, "high": bounds.high}
    else:
        op = "HadamardQuantizeBounded"
        values = np.stack([values, bounds.lookups.lows.numpy(), bounds.lookups.highs.numpy()], 1)
    codes = b.op(
        op,
        lo.value(rotation.args[0]),  # type: ignore[union-attr]
        per_sample_scale(lo, node, scale, values, f"{node.meta['site']}.input_scale"),
        name=f"{node.meta['site']}.codes",
        domain=HQC_DOMAIN,
        block=block,
        **numbers,
        channel_axis=1 if image else -1,
        regular=int(regular),
    )
    return typed(codes, INT8, lo.shape(node))


def per_sample_scale(
    lo: TensorRtState, scaled: fx.Node, scale: Any, values: NDArray[np.float32], name: str
) -> ir.Value:
    """A table [T, …] at the timestep's row as [N, …], one for each sample of the tensor that a plugin scales."""
    picked = looked_up(lo, scale, values, 1, name)
    if scale not in lo.shared or scaled in lo.shared:
        return picked
    return typed(lo.builder.op("Expand", picked, batch_dims(lo, [BATCH, *values.shape[1:]]), name=f"{name}s"), FLOAT)
