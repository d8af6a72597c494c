"""Attention of the `onnxruntime` target: one MultiHeadAttention node, which tiles scores instead of storing them."""

import onnx_ir as ir
from torch import fx

from hqc.export.aten_math import MATH
from hqc.export.builder import MICROSOFT_DOMAIN, typed
from hqc.export.lowering import Lowering
from hqc.program import aten

__all__ = ["attention"]

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
