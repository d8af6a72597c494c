"""The `onnxruntime` target: integer products that are exact in int32, laid out for ONNX Runtime's CPU kernels.

    activation  [Transpose to NHWC] → Hadamard → Mul(1/s) → Clip → QuantizeLinear(1, zero point qmax + 1) : uint8
    weight      INT4 → Cast → Reshape → MatMul(H) → Reshape → Transpose → Cast(INT8) : [K, O], folded at load
    product     im2col → MatMulIntegerToFloat(·s_w/√b) → Mul(s_a) → Add(bias)
                two digits: MatMulInteger twice → low + 128·high in int32 → Cast → the same

Unsigned activations and a signed weight are the fast path of that runtime. The weight chain starts with Cast because
the runtime folds Cast and does not fold DequantizeLinear. Pixels are padded with the zero point, code 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from hqc.errors import ExportError
from hqc.export.aten_math import MATH
from hqc.export.aten_shapes import SHAPES
from hqc.export.builder import HQC_DOMAIN, MICROSOFT_DOMAIN, to_nchw, to_nhwc, typed
from hqc.export.lowering import Lowering, Translations
from hqc.export.scale_bank import ScaleBank
from hqc.export.shared import int4_weight, nearest_timestep
from hqc.export.sites import PRODUCTS, Product, QuantisedSite, products_of
from hqc.ops import sylvester
from hqc.ops.weight_codes import DIGIT_BASE
from hqc.program import Program, aten, is_op

__all__ = ["lower_onnxruntime"]

ops = torch.ops.hqc
UINT8, INT8, INT32, FLOAT = ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.FLOAT


def lower_onnxruntime(program: Program, opset: int) -> tuple[ir.Model, Lowering]:
    """Requires: a captured program, or an integer one (`rotate_weights`, `split_digits`, optionally `pack_int4`)."""
    lowering = _IntegerLowering(program, opset)
    return lowering.run(), lowering


class _IntegerLowering(Lowering):
    """Adds the bank of scales, and the nodes between a product and its rescale, which are emitted as one piece."""

    def __init__(self, program: Program, opset: int) -> None:
        super().__init__(program, _TRANSLATIONS, opset)
        self.bank = ScaleBank(self)
        self.absorbed = _absorbed(program)
        self.weights: dict[str, list[ir.Value]] = {}

    def tap_details(self, site: QuantisedSite) -> dict[str, Any]:
        """Codes carry the zero point; the products' weights are watched."""
        top = int(site.quantiser.args[3])  # type: ignore[arg-type]
        weights = tuple(str(w.name) for w in self.weights.get(site.site, ()))
        return {"zero_point": top + 1, "weights": weights, "largest_code": 2 * top + 1}


def _absorbed(program: Program) -> set[fx.Node]:
    """Products, their digit sums and their weight expressions: `rescale` emits them."""
    absorbed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if not is_op(node, ops.rescale.default):
            continue
        accumulator: fx.Node = node.args[0]  # type: ignore[assignment]
        products = products_of(accumulator)
        if not products:
            raise ExportError(
                f"site {node.meta.get('site')}", "has an accumulator that is not a product", "Report a bug."
            )
        absorbed.add(accumulator)
        for product in products:
            absorbed |= {product.node, *(u for u in product.node.users if is_op(u, aten.mul.Scalar))}
            absorbed |= _weight_nodes(product.node.args[1])
    return absorbed


def _weight_nodes(node: Any) -> set[fx.Node]:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return set()
    return {node} | _weight_nodes(node.args[0])


# ---- activations ---------------------------------------------------------------------------------------------------


def _hadamard(lo: _IntegerLowering, node: fx.Node) -> ir.Value:
    """Rotates the last axis: images are brought to NHWC first, where the products want them anyway."""
    x, block, axis = node.args
    image = int(axis) != -1 and int(axis) != len(lo.shape(x)) - 1  # type: ignore[arg-type]
    value = to_nhwc(lo.builder, lo.value(x)) if image else lo.value(x)
    rotated = lo.builder.op("Hadamard", value, domain=HQC_DOMAIN, block=int(block), axis=-1, name=node.name)  # type: ignore[arg-type]
    return to_nchw(lo.builder, typed(rotated, FLOAT)) if image else rotated


def _zero_point(top: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(top + 1, dtype=np.uint8)


def _quantize(lo: _IntegerLowering, node: fx.Node) -> ir.Value:
    """uint8 codes q + qmax + 1, quantised in NHWC; rounding after clipping to whole numbers is rounding before it."""
    b = lo.builder
    x, scale, low, high = node.args
    rank = len(lo.shape(x))
    rotated = is_op(x, ops.hadamard.default)
    value = to_nhwc(b, lo.value(x)) if rank == 4 and rotated else lo.value(x)
    level = b.op("Mul", value, lo.bank.reciprocal(scale, rank))  # type: ignore[arg-type]
    clipped = b.op("Clip", level, b.scalar(float(low)), b.scalar(float(high)))  # type: ignore[arg-type]
    zero_point = b.constant(_zero_point(int(high)), "zero_point")  # type: ignore[arg-type]
    name = f"{node.meta['site']}.codes" if "site" in node.meta else node.name
    codes = typed(b.op("QuantizeLinear", clipped, b.scalar(1.0), zero_point, name=name), UINT8)
    # Without a rotation the codes are transposed instead of the values: a quarter of the bytes.
    if rank == 4 and rotated:
        return to_nchw(b, codes)
    return codes


def _dequantize(lo: _IntegerLowering, node: fx.Node) -> ir.Value:
    """For sites that stayed in floating point (accumulators past int32)."""
    b = lo.builder
    codes, scale = node.args
    if not is_op(codes, ops.quantize.default):
        return b.op("DequantizeLinear", lo.value(codes), lo.value(scale), axis=0, name=node.name)
    high = int(codes.args[3])  # type: ignore[arg-type, union-attr]
    real = b.op("DequantizeLinear", lo.value(codes), b.scalar(1.0), b.constant(_zero_point(high), "zero_point"))
    return b.op("Mul", real, lo.bank.scale(scale, len(lo.shape(codes))), name=node.name)  # type: ignore[arg-type]


# ---- weights -------------------------------------------------------------------------------------------------------


def _weight(lo: _IntegerLowering, node: fx.Node) -> ir.Value:
    """The codes [O, C, …] of a weight expression: stored ones as they are, computed ones as whole floats."""
    b = lo.builder
    if node.op == "get_attr":
        return lo.value(node)
    if is_op(node, ops.unpack_int4.default):
        return int4_weight(lo, node)
    codes = _weight(lo, node.args[0])  # type: ignore[arg-type]
    if is_op(node, aten.to.dtype):
        return codes
    real = b.cast(codes, FLOAT)
    if is_op(node, ops.rotate_codes.default):
        return _rotated(lo, real, lo.shape(node), int(node.args[1]))  # type: ignore[arg-type]
    base = float(DIGIT_BASE)
    high = b.op("Floor", b.op("Mul", b.op("Add", real, b.scalar(base / 2)), b.scalar(1 / base)))
    return typed(high if node.args[1] else b.op("Sub", real, b.op("Mul", high, b.scalar(base))), FLOAT)


def _rotated(lo: _IntegerLowering, codes: ir.Value, shape: Sequence[int | str], block: int) -> ir.Value:
    """H·w over groups of input channels: [O, C, …] -> [O, C/b, b, K] -> product -> [O, C, …]; whole numbers."""
    b = lo.builder
    matrix = b.constant(sylvester(block).numpy(), f"hadamard_{block}")
    outputs, channels = int(shape[0]), int(shape[1])
    groups = b.reshape(codes, [outputs, channels // block, block, -1])
    return typed(b.reshape(b.op("MatMul", matrix, groups), [int(d) for d in shape]), FLOAT)


def _matrix(lo: _IntegerLowering, node: fx.Node, name: str) -> ir.Value:
    """The int8 matrix [K, O] of a product, K = C or kh·kw·C in im2col's order."""
    b = lo.builder
    weight: fx.Node = node.args[1]  # type: ignore[assignment]
    codes = _weight(lo, weight)
    if is_op(node, ops.int_conv2d.default):
        outputs = int(lo.shape(weight)[0])
        turned = (
            b.transpose(codes, [2, 3, 1, 0])
            if codes.dtype != ir.DataType.INT4
            else b.transpose(b.cast(codes, INT8), [2, 3, 1, 0])
        )
        flat = typed(b.reshape(turned, [-1, outputs]), turned.dtype)
    else:
        flat = b.transpose(codes if codes.dtype != ir.DataType.INT4 else b.cast(codes, INT8), [1, 0])
    matrix = b.cast(flat, INT8, name=name)
    b.rename(matrix, name)
    return matrix


# ---- products ------------------------------------------------------------------------------------------------------


def im2col(lo: Lowering, codes: ir.Value, node: fx.Node, zero_point: int) -> ir.Value:
    """uint8 [N, H, W, C] -> [N, H', W', kh·kw·C]: padded with the zero point, one slice for each tap, joined."""
    b = lo.builder
    stride, padding, dilation = ([int(v) for v in node.args[i]] for i in (2, 3, 4))  # type: ignore[union-attr, arg-type]
    kernel = [int(d) for d in lo.shape(node.args[1])[2:]]
    size = [int(d) for d in lo.shape(node)[2:]]
    if any(padding):
        top, left = padding
        pads = b.ints(0, top, left, 0, 0, top, left, 0)
        codes = typed(b.op("Pad", codes, pads, b.constant(_zero_point(zero_point - 1), "zero_point")), UINT8)
    if kernel == [1, 1] and stride == [1, 1]:
        return codes
    taps = [
        _slice(lo, codes, [i * dilation[0], j * dilation[1]], size, stride)
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return taps[0] if len(taps) == 1 else typed(b.op("Concat", *taps, axis=3), UINT8)


def _slice(lo: Lowering, codes: ir.Value, start: list[int], size: list[int], stride: list[int]) -> ir.Value:
    b = lo.builder
    ends = [s + (n - 1) * step + 1 for s, n, step in zip(start, size, stride, strict=True)]
    return typed(b.op("Slice", codes, b.ints(*start), b.ints(*ends), b.ints(1, 2), b.ints(*stride)), UINT8)


def _rescale(lo: _IntegerLowering, node: fx.Node) -> ir.Value:
    """A site's whole product: y = acc·s_w[c]·s_a[n] + bias[c], in the order of operations of `hqc::rescale`."""
    b = lo.builder
    accumulator, scale_a, scale_w, bias = node.args[:4]
    products = products_of(accumulator)  # type: ignore[arg-type]
    first = products[0].node
    site, image = str(node.meta["site"]), is_op(first, ops.int_conv2d.default)
    rank, top = len(lo.shape(node)), int(first.args[-1])  # type: ignore[arg-type]
    quantiser: fx.Node = first.args[0]  # type: ignore[assignment]
    codes = lo.value(quantiser)
    columns = im2col(lo, to_nhwc(b, codes), first, top + 1) if image else codes
    names = [f"{site}.weight_matrix"] if len(products) == 1 else [f"{site}.weight_low", f"{site}.weight_high"]
    weights = [_matrix(lo, p.node, name) for p, name in zip(products, names, strict=True)]
    y = _scaled_product(lo, columns, weights, products, top, lo.value(scale_w))
    y = b.op("Mul", y, lo.bank.scale(scale_a, rank))  # type: ignore[arg-type]
    if bias is not None:
        y = b.op("Add", y, lo.value(bias))
    y = typed(y, FLOAT)
    b.rename(y, site)
    lo.weights[site] = weights
    return to_nchw(b, y) if image else y


def _scaled_product(
    lo: Lowering, columns: ir.Value, weights: list[ir.Value], products: Sequence[Product], top: int, scale: ir.Value
) -> ir.Value:
    """acc·s_w[c] as floats: one fused node for one digit; two digits meet in int32, where their sum is exact."""
    b = lo.builder
    zero_point = b.constant(_zero_point(top), "zero_point")
    if len(weights) == 1:
        return b.op(
            "MatMulIntegerToFloat", columns, weights[0], b.scalar(1.0), scale, zero_point, domain=MICROSOFT_DOMAIN
        )
    low, high = (typed(b.op("MatMulInteger", columns, w, zero_point), INT32) for w in weights)
    total = b.op("Add", low, b.op("Mul", high, b.scalar(products[1].factor, "int32")))
    return b.op("Mul", b.op("Cast", total, to=FLOAT), scale)


# ---- dispatch ------------------------------------------------------------------------------------------------------


def _index_select(lo: _IntegerLowering, node: fx.Node) -> ir.Value | None:
    """Scale tables are looked up together, by the bank, when first asked for."""
    return None if lo.bank.holds(node) else SHAPES[aten.index_select.default](lo, node)


def _unless_absorbed(translation: Any) -> Any:
    return lambda lo, node: None if node in lo.absorbed else translation(lo, node)


_TRANSLATIONS: Translations = {
    key: _unless_absorbed(translation)
    for key, translation in {
        **SHAPES,
        **MATH,
        ops.nearest_timestep.default: nearest_timestep,
        ops.hadamard.default: _hadamard,
        ops.quantize.default: _quantize,
        ops.dequantize.default: _dequantize,
        ops.unpack_int4.default: int4_weight,
        ops.rescale.default: _rescale,
        aten.index_select.default: _index_select,
        **dict.fromkeys((*PRODUCTS, ops.rotate_codes.default, ops.digit.default), lambda lo, node: None),
    }.items()
}
