"""The `portable` target: fake-quant semantics in standard operators, for any runtime, and the oracle of the others.

    rotation    Reshape → MatMul with a constant ±H → Reshape → Mul(1/√b), in the order of the torch reference
    activation  rotation → Mul(1/s) → Clip(qmin, qmax) → QuantizeLinear(1) → DequantizeLinear(1) → Mul(s) → rotation
                Max(low), Min(high) in the place of Clip where each sample has a range of its own
    weight      INT4 or INT8 initialiser → DequantizeLinear(s_w, axis 0)
    groups      of channels with scales of their own: see `hqc.export.groups`
    layer       Conv, Gemm, MatMul in floating point

The scale per sample cannot be a QuantizeLinear scale (those are constants for some runtimes and never one a sample),
so it multiplies outside and the quantiser's own scale is 1. QuantizeLinear has no zero point and names its
`output_dtype`: with an INT8 zero point onnxruntime 1.27 to 1.32 refuses the graph when a Reshape or a Transpose
follows. ONNX's INT8 saturates at -128, the method's range is narrow: hence the Clip.

There is no function and no operator on bits: OpenVINO 2025.2 to 2026.4 refuse the first and compute the second wrongly.
With `functions=True` a rotation is one node `hqc::Hadamard` with its body, for tools that have their own kernel for it.
"""

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from hqc.bounds import QUANTISERS
from hqc.export.aten_math import MATH
from hqc.export.aten_shapes import SHAPES
from hqc.export.builder import HQC_DOMAIN, typed
from hqc.export.groups import dequantize_grouped, dynamic_scale, quantize_grouped
from hqc.export.lowering import Lowering, Translations
from hqc.export.shared import int4_weight, looked_up, nearest_timestep, per_sample, signed_sums
from hqc.export.softmax import softmax_quantize
from hqc.program import Program, is_op
from hqc.sites import rotation_of

__all__ = ["PortableLowering", "lower_portable"]

ops = torch.ops.hqc


def lower_portable(
    program: Program, opset: int, *, one_timestep: bool = False, functions: bool = False
) -> tuple[ir.Model, Lowering]:
    """functions: rotations are `hqc::Hadamard` nodes; the model still lacks the function.

    Requires: a captured program, or a frozen one (`freeze_integers`, optionally `pack_int4`).
    """
    lowering = PortableLowering(program, opset, one_timestep=one_timestep, functions=functions)
    return lowering.run(), lowering


class PortableLowering(Lowering):
    """The table of this target."""

    def __init__(self, program: Program, opset: int, *, one_timestep: bool = False, functions: bool = False) -> None:
        translations = {**_TRANSLATIONS, ops.hadamard.default: _hadamard_call} if functions else _TRANSLATIONS
        super().__init__(program, translations, opset, one_timestep=one_timestep)


def _hadamard(lo: Lowering, node: fx.Node) -> ir.Value:
    factor = lo.builder.scalar(float(np.float32(int(node.args[1]) ** -0.5)))  # type: ignore[arg-type]
    return lo.builder.op("Mul", signed_sums(lo, node, node.name), factor, name=node.name)


def _hadamard_call(lo: Lowering, node: fx.Node) -> ir.Value:
    x, _, axis = node.args[:3]
    block, regular = rotation_of(node)
    attributes = {"block": block, "axis": int(axis), "regular": int(regular)}  # type: ignore[arg-type]
    return lo.builder.op("Hadamard", lo.value(x), domain=HQC_DOMAIN, name=node.name, **attributes)


def _quantize(lo: Lowering, node: fx.Node) -> ir.Value:
    b = lo.builder
    x, scale, low, high = node.args
    rank = len(lo.shape(x))
    level = b.op("Mul", lo.value(x), per_sample(lo, b.op("Reciprocal", lo.value(scale)), rank))
    if isinstance(low, fx.Node):
        low_rows, high_rows = (per_sample(lo, lo.value(bound), rank) for bound in (low, high))
        clipped = b.op("Min", b.op("Max", level, low_rows), high_rows)
    else:
        clipped = b.op("Clip", level, b.scalar(float(low)), b.scalar(float(high)))  # type: ignore[arg-type]
    name = f"{node.meta['site']}.codes" if "site" in node.meta else node.name
    codes = b.op("QuantizeLinear", clipped, b.scalar(1.0), output_dtype=ir.DataType.INT8, name=name)
    return typed(codes, ir.DataType.INT8)


def _dequantize(lo: Lowering, node: fx.Node) -> ir.Value:
    b = lo.builder
    codes, scale = node.args
    if not is_op(codes, *QUANTISERS):
        return b.op("DequantizeLinear", lo.value(codes), lo.value(scale), axis=0, name=node.name)
    real = b.op("DequantizeLinear", lo.value(codes), b.scalar(1.0))
    return b.op("Mul", real, per_sample(lo, lo.value(scale), len(lo.shape(codes))), name=node.name)


_TRANSLATIONS: Translations = {
    **SHAPES,
    **MATH,
    ops.nearest_timestep.default: nearest_timestep,
    ops.hadamard.default: _hadamard,
    **dict.fromkeys(QUANTISERS, _quantize),
    ops.dequantize.default: _dequantize,
    ops.dynamic_scale.default: dynamic_scale,
    ops.quantize_grouped.default: quantize_grouped,
    ops.dequantize_grouped.default: dequantize_grouped,
    ops.unpack_int4.default: int4_weight,
    ops.lookup.default: looked_up,
    ops.softmax_quantize.default: softmax_quantize,
}
