"""Attention of the `onnxruntime` target: one node where it is float, two products of integers where it is quantised.

float       MultiHeadAttention, which tiles scores instead of storing them
quantised   MatMulIntegerToFloat(c_q, c_kᵀ)·(s_q·s_k) -> Add(mask) -> Softmax -> codes -> MatMulIntegerToFloat(c_p, c_v)

A product of which an operand is float, or a softmax in powers of two, is a MatMul of real values.
"""

import onnx_ir as ir
from torch import fx

from hqc.export.aten_math import MATH
from hqc.export.builder import MICROSOFT_DOMAIN, typed
from hqc.export.lowering import Lowering
from hqc.export.ort_activations import IntegerState, code_zero
from hqc.program import aten, is_op
from hqc.sites import QuantisedSite

__all__ = ["attention", "product"]

_PLAIN = MATH[aten.scaled_dot_product_attention.default]
_HEADS_LAST = (0, 2, 1, 3)


def attention(lo: Lowering, node: fx.Node) -> ir.Value:
    """softmax(q·kᵀ·scale)·v over [N, heads, L, D]; with a mask, or heads of different widths, written out instead."""
    query, key, value = (lo.shape(argument) for argument in node.args[:3])
    plain = len(node.args) == 3 and not (set(node.kwargs) - {"scale"})
    if not plain or len(query) != 4 or not query[1] == key[1] == value[1] or not query[3] == key[3] == value[3]:
        return _PLAIN(lo, node)  # type: ignore[no-any-return]
    b, (_, heads, length, width) = lo.builder, query
    tokens = []
    for argument in node.args[:3]:
        heads_last = b.transpose(lo.value(argument), _HEADS_LAST)
        tokens.append(b.reshape(heads_last, [-1, int(lo.shape(argument)[2]), int(heads) * int(width)]))
    scale = node.kwargs.get("scale")
    options = {} if scale is None else {"scale": float(scale)}  # type: ignore[arg-type]
    y = b.op("MultiHeadAttention", *tokens, domain=MICROSOFT_DOMAIN, num_heads=int(heads), name=node.name, **options)
    # Shape inference stops at this node: tools that read types, such as quantisers, are told.
    y = typed(y, ir.DataType.FLOAT, (query[0], int(length), int(heads) * int(width)))
    split = b.reshape(y, [-1, int(length), int(heads), int(width)])
    return b.transpose(typed(split, ir.DataType.FLOAT), _HEADS_LAST)


def product(lo: IntegerState, node: fx.Node) -> ir.Value:
    """A product of two codes within attention: exact in int32, then the scales; of anything else a MatMul."""
    found = lo.code_products.get(node)
    if found is None:
        return MATH[aten.matmul.default](lo, node)  # type: ignore[no-any-return]
    b, (left, right) = lo.builder, found.codes
    codes, other = _codes(lo, left), _codes(lo, right)
    if is_op(node.args[1], aten.transpose.int):
        *rows, last, width = range(len(lo.shape(node)))
        other = b.transpose(other, [*rows, width, last])
    scales: list[fx.Node] = [site.quantiser.args[1] for site in found.codes]  # type: ignore[misc]
    numbers = [_number(lo, scale) for scale in scales]
    factors = [b.scalar(1.0) if number is None else number for number in numbers]
    inputs = [codes, other, *factors, _zero(lo, left), _zero(lo, right)]
    while inputs[-1] is None:
        inputs.pop()
    y = b.op("MatMulIntegerToFloat", *inputs, domain=MICROSOFT_DOMAIN, name=node.name)
    y, rank = typed(y, ir.DataType.FLOAT), len(lo.shape(node))
    left_over = [scale for scale, number in zip(scales, numbers, strict=True) if number is None]
    by_sample = [lo.bank.value(scale, ("scale", rank)) for scale in left_over]
    if not by_sample:
        return y
    return typed(b.op("Mul", y, by_sample[0] if len(by_sample) == 1 else b.op("Mul", *by_sample)), ir.DataType.FLOAT)


def _codes(lo: IntegerState, site: QuantisedSite) -> ir.Value:
    return lo.codes.get(site.quantiser) or lo.value(site.quantiser)


def _zero(lo: IntegerState, site: QuantisedSite) -> ir.Value | None:
    """The code of zero, where it is not 0."""
    zero = code_zero(lo, site.quantiser)
    return lo.builder.constant(zero, "zero_point") if zero else None


def _number(lo: IntegerState, scale: fx.Node) -> ir.Value | None:
    """A scale that is one number [1] for the whole batch: that of a single row, or of a single timestep."""
    if is_op(scale, aten.index_select.default) and tuple(lo.shape(scale.args[0])) == (1,):
        return lo.value(scale.args[0])
    return lo.bank.value(scale, ("number", 1)) if scale in lo.shared else None
