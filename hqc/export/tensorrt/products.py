"""Products of the `tensorrt` target: int8 convolutions and matrix products with the scales around them.

    image   Conv(DQ(q, s₀), DQ(W int8 [O, C, kh, kw], s_w, axis 0))  -> ·p[t] -> + bias
    tokens  MatMul(DQ(q, s₀), DQ(W int8 [K, O], s_w, axis 1))        -> ·p[t] -> + bias
    two     the same for each digit, the factor in its s_w, and an Add
    plugin  Int4Conv | Int4Linear(q, packed W, s_w, s[t], bias)

    p[t] = s[t]/s₀ as a table in float32

W already holds H, s_w already 1/√b (`rotate_weights`), except that a plugin is given the stored codes and rotates them
itself: H times a 4-bit code needs more than 4 bits. Where the weight was rotated before it was quantised nobody does.
"""

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from hqc.export.builder import HQC_DOMAIN, typed
from hqc.export.tensorrt.activations import TensorRtState, dequantized, int8_pair, looked_up, per_sample_scale
from hqc.export.tensorrt.forms import Form, scale_table
from hqc.export.tensorrt.plugin_fit import rotation_attributes
from hqc.export.tensorrt.weights import int8_digits, stored_codes, total_codes
from hqc.ops.weight_codes import pack_int4
from hqc.program import is_op
from hqc.sites import products_of, rotation_within

__all__ = ["packed_rows", "rescale"]

ops = torch.ops.hqc
FLOAT = ir.DataType.FLOAT


def rescale(lo: TensorRtState, node: fx.Node) -> ir.Value:
    """A site's whole product: y = acc·s_w[c]·s_a[n] + bias[c] in float32, or in the activations' type by a plugin."""
    site = str(node.meta["site"])
    form = lo.forms[site]
    value = _plugin(lo, node) if form.form is Form.INT4_PLUGIN else _int8(lo, node)
    lo.builder.rename(value, site)
    return typed(value, FLOAT, lo.shape(node))


def _int8(lo: TensorRtState, node: fx.Node) -> ir.Value:
    b, site = lo.builder, str(node.meta["site"])
    accumulator, scale_a, scale_w, bias = node.args[:4]
    products = products_of(accumulator)  # type: ignore[arg-type]
    first, static = products[0].node, lo.forms[site].static_scale
    assert static is not None
    image = is_op(first, ops.int_conv2d.default)
    codes = dequantized(lo, lo.value(first.args[0]), static, f"{site}.codes.real")
    scale = lo.program.state[str(scale_w.target)].numpy()  # type: ignore[union-attr]
    digits = int8_digits(total_codes(lo.program, products), site)
    parts = []
    for index, digit in enumerate(digits):
        name = f"{site}.weight_int8" if len(digits) == 1 else f"{site}.weight_int8_{index}"
        array = digit.codes.numpy() if image else digit.codes.numpy().T.copy()
        weight = int8_pair(lo, array, scale * np.float32(digit.factor), 0 if image else 1, name)
        wish = name.replace("weight_int8", "product")
        part = _conv(lo, codes, weight, first, wish) if image else b.op("MatMul", codes, weight, name=wish)
        parts.append(typed(part, FLOAT))
    product = parts[0] if len(parts) == 1 else typed(b.op("Add", *parts, name=f"{site}.product"), FLOAT)
    table = scale_table(lo.program, scale_a, site).numpy()
    factor = looked_up(lo, scale_a, table / np.float32(static), len(lo.shape(node)), f"{site}.output_scale")  # type: ignore[arg-type]
    y = typed(b.op("Mul", product, factor, name=f"{site}.scaled"), FLOAT)
    if bias is None:
        return y
    channels = lo.value(bias)
    offset = b.reshape(channels, [1, -1, 1, 1], f"{site}.offset") if image else channels
    return typed(b.op("Add", y, offset, name=f"{site}.sum"), FLOAT)


def _conv(lo: TensorRtState, codes: ir.Value, weight: ir.Value, product: fx.Node, name: str) -> ir.Value:
    stride, padding, dilation = ([int(v) for v in product.args[i]] for i in (2, 3, 4))  # type: ignore[union-attr, arg-type]
    kernel = [int(d) for d in lo.shape(product.args[1])[2:]]
    return lo.builder.op(
        "Conv", codes, weight, strides=stride, pads=padding * 2, dilations=dilation, kernel_shape=kernel, name=name
    )


# ---- plugins -------------------------------------------------------------------------------------------------------


def packed_rows(codes: Tensor) -> Tensor:
    """Codes in −8…7 [O, C] or [O, C, kh, kw] -> uint8 [O, kh·kw·C/2], the first code in the low nibble."""
    rows = codes.permute(0, *range(2, codes.ndim), 1).reshape(codes.shape[0], -1)
    return pack_int4(rows.contiguous()).view(codes.shape[0], -1)


def _plugin(lo: TensorRtState, node: fx.Node) -> ir.Value:
    b, site = lo.builder, str(node.meta["site"])
    accumulator, scale_a, scale_w, bias = node.args[:4]
    product = products_of(accumulator)[0].node  # type: ignore[arg-type]
    codes = stored_codes(lo.program, product.args[1])  # type: ignore[arg-type]
    name = f"{site}.weight_packed_rows"
    # The same bytes as int8: TensorRT has no uint8 weights.
    packed = b.initializer(name, ir.tensor(packed_rows(codes).numpy().view(np.int8), name=name))
    table = scale_table(lo.program, scale_a, site).numpy()
    offsets = b.constant(np.zeros(codes.shape[0], np.float32), "no_bias") if bias is None else lo.value(bias)
    inputs = (
        lo.value(product.args[0]),
        packed,
        lo.value(scale_w),
        per_sample_scale(lo, node, scale_a, table, f"{site}.scale"),
        offsets,
    )
    attributes = {"out_type": int(FLOAT), **rotation_attributes(rotation_within(product.args[1]))}
    if is_op(product, ops.int_conv2d.default):
        kernel = int(codes.shape[2])
        stride, padding = (int(product.args[i][0]) for i in (2, 3))  # type: ignore[index, arg-type]
        attributes |= {"kernel": kernel, "stride": stride, "padding": padding}
        return b.op("Int4Conv", *inputs, domain=HQC_DOMAIN, name=site, **attributes)
    return b.op("Int4Linear", *inputs, domain=HQC_DOMAIN, name=site, **attributes)
