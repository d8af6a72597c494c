"""Products of the `onnxruntime` target: im2col by one Gather, an exact int32 product, the scales of its result.

columns     codes [N, H, W, C] -> Pad(zero point) -> Gather of pixels -> [N, H'·W', kh·kw·C]
product     MatMulIntegerToFloat(columns, W [K, O])·s_w -> Mul(s_a) -> Add(bias) -> [N, O, H', W']
two halves  w = w₀ + w₁ with |w_i| ≤ 64: one product over columns ⊕ columns and w₀ over w₁
two digits  w = low + 128·high: MatMulInteger twice, joined in int32, where their sum is exact
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import fx

from hqc.export.builder import MICROSOFT_DOMAIN, to_nchw, to_nhwc, typed
from hqc.export.ort_activations import IntegerState, zero_point
from hqc.export.ort_weights import weight_matrix
from hqc.program import is_op
from hqc.sites import Product, products_of

__all__ = ["rescale"]

ops = torch.ops.hqc
UINT8, INT8, FLOAT = ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.FLOAT


def rescale(lo: IntegerState, node: fx.Node) -> ir.Value:
    """A site's whole product: y = acc·s_w[c]·s_a[n] + bias[c], in the order of operations of `hqc::rescale`."""
    b = lo.builder
    accumulator, scale_a, scale_w, bias = node.args[:4]
    products = products_of(accumulator)  # type: ignore[arg-type]
    first = products[0].node
    site, image = str(node.meta["site"]), is_op(first, ops.int_conv2d.default)
    codes = lo.value(first.args[0])
    columns = _im2col(lo, to_nhwc(b, codes), first) if image else codes
    names = ["weight_matrix"] if len(products) == 1 else ["weight_matrix_0", "weight_matrix_1"]
    weights = [
        weight_matrix(lo, product.node.args[1], f"{site}.{name}")  # type: ignore[arg-type]
        for product, name in zip(products, names, strict=True)
    ]
    lo.weights[site] = weights
    if scale_a in lo.shared:
        factor = lo.bank.value(scale_a, ("number", 1))  # type: ignore[arg-type]
        y = _scaled_product(lo, columns, weights, products, factor, lo.value(scale_w), lo.optional(bias))
    else:
        y = _scaled_product(lo, columns, weights, products, None, lo.value(scale_w), None)
        y = b.op("Mul", y, lo.bank.value(scale_a, ("scale", len(lo.shape(node)))))  # type: ignore[arg-type]
        y = y if bias is None else b.op("Add", y, lo.value(bias))
    y = typed(y, FLOAT)
    b.rename(y, site)
    return to_nchw(b, y) if image else y


def _top(product: fx.Node) -> int:
    return int(product.args[-1])  # type: ignore[arg-type]


def _scaled_product(
    lo: IntegerState,
    columns: ir.Value,
    weights: list[ir.Value],
    products: Sequence[Product],
    number: ir.Value | None,
    scale: ir.Value,
    bias: ir.Value | None,
) -> ir.Value:
    """acc·number·s_w[c] + bias[c] as floats, in one node where one product is enough."""
    b = lo.builder
    zero = b.constant(zero_point(_top(products[0].node)), "zero_point")

    def product(codes: ir.Value, matrix: ir.Value, factor: int, last: ir.Value | None) -> ir.Value:
        unit = b.scalar(float(factor))
        if number is not None:
            unit = number if factor == 1 else b.op("Mul", number, unit)
        more = () if last is None else (None, last)
        return b.op("MatMulIntegerToFloat", codes, matrix, unit, scale, zero, *more, domain=MICROSOFT_DOMAIN)

    if len(weights) == 1:
        return product(columns, weights[0], 1, bias)
    if all(part.factor == 1 for part in products):
        twice = typed(b.op("Concat", columns, columns, axis=-1), UINT8)
        return product(twice, typed(b.op("Concat", *weights, axis=0), INT8), 1, bias)
    (low, high), (one, base) = weights, (part.factor for part in products)
    return b.op("Add", product(columns, low, one, bias), product(columns, high, base, None))


def _im2col(lo: IntegerState, codes: ir.Value, node: fx.Node) -> ir.Value:
    """uint8 [N, H, W, C] -> [N, H', W', kh·kw·C]: padded with the zero point, then all taps of all pixels gathered."""
    b = lo.builder
    stride, padding, dilation = ([int(v) for v in node.args[i]] for i in (2, 3, 4))  # type: ignore[union-attr, arg-type]
    kernel = [int(d) for d in lo.shape(node.args[1])[2:]]
    channels, *size = (int(d) for d in lo.shape(node.args[0])[1:])
    result = [int(d) for d in lo.shape(node)[2:]]
    if any(padding):
        top, left = padding
        pads = b.ints(0, top, left, 0, 0, top, left, 0)
        codes = typed(b.op("Pad", codes, pads, b.constant(zero_point(_top(node)), "zero_point")), UINT8)
        size = [size[0] + 2 * top, size[1] + 2 * left]
    if kernel == [1, 1] and stride == [1, 1]:
        return codes
    pixels = typed(b.reshape(codes, [0, size[0] * size[1], channels]), UINT8)
    taps = b.constant(_tap_indices(*size, *kernel, *stride, *dilation, *result), "taps")
    gathered = b.op("Gather", pixels, taps, axis=1)
    return typed(b.reshape(gathered, [0, *result, kernel[0] * kernel[1] * channels]), UINT8)


@lru_cache(maxsize=64)
def _tap_indices(
    height: int, width: int, kh: int, kw: int, sh: int, sw: int, dh: int, dw: int, rows: int, columns: int
) -> NDArray[np.int32]:
    """For every output pixel and tap the input pixel's index in 0…height·width - 1: [rows·columns·kh·kw]."""
    y = np.arange(rows)[:, None, None, None] * sh + np.arange(kh)[:, None] * dh
    x = np.arange(columns)[:, None, None] * sw + np.arange(kw) * dw
    assert int(y.max()) < height
    assert int(x.max()) < width
    return (y * width + x).reshape(-1).astype(np.int32)
