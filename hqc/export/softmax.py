"""The quantiser of a softmax in standard operators, for `portable` and `onnxruntime`.

level   p·(1/s), or ln(max(p, 2⁻¹²⁶))·(-1/ln 2); Where by the sample's row if a table has both
codes   Clip(0, 2ⁿ-1) → QuantizeLinear(1) as uint8, which alone is a clip to 8 bits
value   s·c, or 2⁻ᶜ by Pow
"""

import onnx_ir as ir
from torch import fx

from hqc.attentions import softmax_kinds
from hqc.export.builder import typed
from hqc.export.lowering import Lowering
from hqc.export.shared import per_sample
from hqc.ops.softmax_quantize import LEAST, PER_OCTAVE

__all__ = ["softmax_quantize"]

_HALF = 0.5
_BYTE = 8


def softmax_quantize(lo: Lowering, node: fx.Node) -> ir.Value:
    """p̂; verification listens to its codes."""
    b, (p, scale, log2, bits) = lo.builder, node.args
    rank, (even, powers) = len(lo.shape(p)), softmax_kinds(lo.program, node)
    x, levels, values = lo.value(p), [], []
    step = per_sample(lo, lo.value(scale), rank) if even else None
    if even:
        levels.append(b.op("Mul", x, per_sample(lo, b.op("Reciprocal", lo.value(scale)), rank)))
    if powers:
        levels.append(b.op("Mul", b.op("Log", b.op("Max", x, b.scalar(LEAST))), b.scalar(-PER_OCTAVE)))
    chosen = b.op("Greater", per_sample(lo, lo.value(log2), rank), b.scalar(_HALF)) if even and powers else None

    def either(found: list[ir.Value]) -> ir.Value:
        return found[0] if chosen is None else b.op("Where", chosen, found[1], found[0])

    level = either(levels)
    if bits != _BYTE:  # at 8 bits QuantizeLinear saturates at the ends of a byte
        level = b.op("Clip", level, b.scalar(0.0), b.scalar(float(2 ** int(bits) - 1)))  # type: ignore[arg-type]
    name = f"{node.meta.get('site', node.name)}.codes"
    codes = typed(b.op("QuantizeLinear", level, b.scalar(1.0), output_dtype=ir.DataType.UINT8, name=name), _UINT8)
    lo.codes[node] = codes
    whole = b.op("DequantizeLinear", codes, b.scalar(1.0))
    if step is not None:
        values.append(b.op("Mul", whole, step))
    if powers:
        values.append(b.op("Pow", b.scalar(2.0), b.op("Neg", whole)))
    return either(values)


_UINT8 = ir.DataType.UINT8
