"""ONNX translations of ATen operators that compute: arithmetic, activations, normalisation, attention, layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx

from hqc.errors import ExportError
from hqc.export.lowering import Lowering, Translation, Translations, onnx_dtype
from hqc.program import aten

__all__ = ["MATH"]


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _operand(lo: Lowering, node: fx.Node, argument: Any) -> ir.Value:
    """An argument in the type of the node's result: torch promotes types, ONNX does not."""
    dtype = lo.scalar_like(node)
    if not isinstance(argument, fx.Node):
        return lo.builder.scalar(argument, dtype)
    value = lo.value(argument)
    if argument.op != "get_attr" and argument.meta.get("dtype", dtype) != dtype:
        return lo.builder.cast(value, onnx_dtype(dtype))
    return value


def _binary(op_type: str, *, neutral: float | None = None) -> Translation:
    """A two-operand node; `x op neutral` is x itself."""

    def translate(lo: Lowering, node: fx.Node) -> ir.Value:
        left, right = node.args[:2]
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            raise ExportError(f"node {node.name}", f"has alpha={alpha}", "Write the factor as a product.")
        if neutral is not None and not isinstance(right, fx.Node) and right == neutral and _keeps_type(node):
            return lo.value(left)
        return lo.builder.op(op_type, _operand(lo, node, left), _operand(lo, node, right), name=node.name)

    return translate


def _keeps_type(node: fx.Node) -> bool:
    return node.args[0].meta.get("dtype") == node.meta.get("dtype")  # type: ignore[union-attr]


def _compare(op_type: str) -> Translation:
    def translate(lo: Lowering, node: fx.Node) -> ir.Value:
        left, right = node.args[:2]
        dtype = left.meta.get("dtype", "float32")  # type: ignore[union-attr]
        other = lo.value(right) if isinstance(right, fx.Node) else lo.builder.scalar(right, dtype)  # type: ignore[arg-type]
        return lo.builder.op(op_type, lo.value(left), other, name=node.name)

    return translate


def _unary(op_type: str) -> Translation:
    return lambda lo, node: lo.builder.op(op_type, lo.value(node.args[0]), name=node.name)


def _reverse_sub(lo: Lowering, node: fx.Node) -> ir.Value:
    return lo.builder.op("Sub", _operand(lo, node, node.args[1]), _operand(lo, node, node.args[0]), name=node.name)


def _rsqrt(lo: Lowering, node: fx.Node) -> ir.Value:
    return lo.builder.op("Reciprocal", lo.builder.op("Sqrt", lo.value(node.args[0])), name=node.name)


def _silu(lo: Lowering, node: fx.Node) -> ir.Value:
    x = lo.value(node.args[0])
    return lo.builder.op("Mul", x, lo.builder.op("Sigmoid", x), name=node.name)


def _gelu(lo: Lowering, node: fx.Node) -> ir.Value:
    return lo.builder.op(
        "Gelu", lo.value(node.args[0]), approximate=str(_argument(node, 1, "approximate", "none")), name=node.name
    )


def _softplus(lo: Lowering, node: fx.Node) -> ir.Value:
    if len(node.args) > 1:
        raise ExportError(f"node {node.name}", "is a softplus with options", "Use the plain one.")
    return lo.builder.op("Softplus", lo.value(node.args[0]), name=node.name)


def _clamp(lo: Lowering, node: fx.Node) -> ir.Value:
    dtype = lo.scalar_like(node)
    limits = [_argument(node, i, name) for i, name in ((1, "min"), (2, "max"))]
    bounds = [None if v is None else lo.builder.scalar(v, dtype) for v in limits]
    return lo.builder.op("Clip", lo.value(node.args[0]), *bounds, name=node.name)


def _softmax(lo: Lowering, node: fx.Node) -> ir.Value:
    return lo.builder.op("Softmax", lo.value(node.args[0]), axis=int(node.args[1]), name=node.name)  # type: ignore[arg-type]


def _reduce(op_type: str) -> Translation:
    def translate(lo: Lowering, node: fx.Node) -> ir.Value:
        axes, keep = _argument(node, 1, "dim"), bool(_argument(node, 2, "keepdim", False))
        inputs = [lo.value(node.args[0])]
        if axes:
            inputs.append(lo.builder.ints(*([axes] if isinstance(axes, int) else axes)))
        return lo.builder.op(op_type, *inputs, keepdims=int(keep), name=node.name)

    return translate


def _where(lo: Lowering, node: fx.Node) -> ir.Value:
    condition, left, right = node.args[:3]
    return lo.builder.op(
        "Where", lo.value(condition), _operand(lo, node, left), _operand(lo, node, right), name=node.name
    )


def _matmul(lo: Lowering, node: fx.Node) -> ir.Value:
    return lo.builder.op("MatMul", *lo.values_of(node.args[:2]), name=node.name)


def _baddbmm(lo: Lowering, node: fx.Node) -> ir.Value:
    """beta·input + alpha·(a @ b)."""
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    b = lo.builder
    product = b.op("MatMul", *lo.values_of(node.args[1:3]))
    if alpha != 1:
        product = b.op("Mul", product, b.scalar(float(alpha)))  # type: ignore[arg-type]
    if beta == 0:
        return product
    added = lo.value(node.args[0])
    if beta != 1:
        added = b.op("Mul", added, b.scalar(float(beta)))  # type: ignore[arg-type]
    return b.op("Add", added, product, name=node.name)


def _einsum(lo: Lowering, node: fx.Node) -> ir.Value:
    return lo.builder.op("Einsum", *lo.values_of(node.args[1]), equation=str(node.args[0]), name=node.name)  # type: ignore[arg-type]


def _attention(lo: Lowering, node: fx.Node) -> ir.Value:
    """softmax(q·kᵀ·scale + mask)·v."""
    query, key, value = lo.values_of(node.args[:3])
    mask, dropout, causal = (_argument(node, i, n) for i, n in ((3, "attn_mask"), (4, "dropout_p"), (5, "is_causal")))
    if causal or dropout:
        raise ExportError(
            f"node {node.name}", "is causal attention or has dropout", "Only plain attention is exported."
        )
    if mask is not None and str(mask.meta.get("dtype")) == "bool":
        raise ExportError(f"node {node.name}", "has a boolean attention mask", "Give an additive mask.")
    b, shape = lo.builder, lo.shape(node.args[0])
    scale = node.kwargs.get("scale")
    factor = float(shape[-1]) ** -0.5 if scale is None else float(scale)  # type: ignore[arg-type]
    perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    scores = b.op("Mul", b.op("MatMul", query, b.transpose(key, perm)), b.scalar(factor))
    if mask is not None:
        scores = b.op("Add", scores, lo.value(mask))
    return b.op("MatMul", b.op("Softmax", scores, axis=-1), value, name=node.name)


def _group_norm(lo: Lowering, node: fx.Node) -> ir.Value:
    """[N, C, …] -> [N, G, M], normalised over M, then per-channel scale and shift.

    Instance normalisation of the groups has a two-pass variance in every runtime; GroupNormalization's own function
    body computes E[x²] - E[x]², which cancels.
    """
    b, x = lo.builder, lo.value(node.args[0])
    groups, epsilon = int(node.args[1]), float(_argument(node, 4, "eps", 1e-5))  # type: ignore[arg-type]
    ones, zeros = (b.constant(np.full(groups, v, np.float32)) for v in (1.0, 0.0))
    inner = b.reshape(x, [0, groups, -1])
    normalised = b.op("InstanceNormalization", inner, ones, zeros, epsilon=epsilon)
    shape = lo.static_shape(node)
    y = b.reshape(normalised, shape)
    channels = [-1] + [1] * (len(shape) - 2)
    for op_type, index, name in (("Mul", 2, "weight"), ("Add", 3, "bias")):
        if (weight := _argument(node, index, name)) is not None:
            y = b.op(op_type, y, b.reshape(lo.value(weight), channels), name=node.name)
    return y


def _layer_norm(lo: Lowering, node: fx.Node) -> ir.Value:
    normalised: Sequence[int] = node.args[1]  # type: ignore[assignment]
    weight, bias, epsilon = (_argument(node, i, n) for i, n in ((2, "weight"), (3, "bias"), (4, "eps")))
    scale = lo.optional(weight)
    if scale is None:
        scale = lo.builder.constant(np.ones(tuple(normalised), np.float32))
    inputs = [lo.value(node.args[0]), scale, *([lo.value(bias)] if bias is not None else [])]
    return lo.builder.op(
        "LayerNormalization",
        *inputs,
        axis=-len(normalised),
        epsilon=1e-5 if epsilon is None else float(epsilon),
        name=node.name,
    )


def _rms_norm(lo: Lowering, node: fx.Node) -> ir.Value:
    """x / √(mean x² + ε) · w over the last axes; ε is float32's own where none is given, as in torch."""
    b, x, dtype = lo.builder, lo.value(node.args[0]), lo.scalar_like(node)
    normalised: Sequence[int] = node.args[1]  # type: ignore[assignment]
    weight, epsilon = _argument(node, 2, "weight"), _argument(node, 3, "eps")
    axes = b.ints(*range(-len(normalised), 0))
    mean = b.op("ReduceMean", b.op("Mul", x, x), axes, keepdims=1)
    floor = float(np.finfo(dtype).eps) if epsilon is None else float(epsilon)
    y = b.op("Div", x, b.op("Sqrt", b.op("Add", mean, b.scalar(floor, dtype))), name=node.name)
    return y if weight is None else b.op("Mul", y, lo.value(weight), name=node.name)


def _outer(lo: Lowering, node: fx.Node) -> ir.Value:
    """[L] and [M] -> [L, M]."""
    b = lo.builder
    left, right = (_operand(lo, node, argument) for argument in node.args[:2])
    return b.op("Mul", b.op("Unsqueeze", left, b.ints(1)), b.op("Unsqueeze", right, b.ints(0)), name=node.name)


def _linear(lo: Lowering, node: fx.Node) -> ir.Value:
    """x·Wᵀ + b as one Gemm over all leading axes, [N, L, C] -> [N·L, C] -> [N·L, O] -> [N, L, O].

    Not MatMul: behind a DequantizeLinear of 8-bit weights onnxruntime turns that into MatMulNBits, which quantises
    the activations once more (seen in 1.32: 5e-3 relative).
    """
    b = lo.builder
    x, weight, bias = lo.value(node.args[0]), lo.value(node.args[1]), lo.optional(_argument(node, 2, "bias"))
    name, rank = str(node.meta.get("site", node.name)), len(lo.shape(node.args[0]))
    flat = x if rank == 2 else b.reshape(x, [-1, int(lo.shape(node.args[1])[1])])
    product = b.op("Gemm", flat, weight, *([bias] if bias is not None else []), transB=1, name=name)
    return product if rank == 2 else b.reshape(product, lo.static_shape(node), name)


def _conv(lo: Lowering, node: fx.Node) -> ir.Value:
    """Conv with explicit padding, over one or two spatial axes."""
    kernel = [int(d) for d in lo.shape(node.args[1])[2:]]
    dilation = _spread(_argument(node, 5, "dilation", 1), len(kernel))
    return lo.builder.op(
        "Conv",
        *_layer_inputs(lo, node),
        strides=_spread(_argument(node, 3, "stride", 1), len(kernel)),
        pads=_pads(_argument(node, 4, "padding", 0), kernel, dilation),
        dilations=dilation,
        group=int(_argument(node, 6, "groups", 1)),
        kernel_shape=kernel,
        name=str(node.meta.get("site", node.name)),
    )


def _conv_transpose(lo: Lowering, node: fx.Node) -> ir.Value:
    """ConvTranspose; arguments: stride, padding, output padding, groups, dilation."""
    kernel = [int(d) for d in lo.shape(node.args[1])[2:]]
    stride, padding, extra, groups, dilation = (
        _argument(node, i, name, default)
        for i, name, default in (
            (3, "stride", 1),
            (4, "padding", 0),
            (5, "output_padding", 0),
            (6, "groups", 1),
            (7, "dilation", 1),
        )
    )
    return lo.builder.op(
        "ConvTranspose",
        *_layer_inputs(lo, node),
        strides=_spread(stride, len(kernel)),
        pads=_spread(padding, len(kernel)) * 2,
        output_padding=_spread(extra, len(kernel)),
        group=int(groups),
        dilations=_spread(dilation, len(kernel)),
        kernel_shape=kernel,
        name=node.name,
    )


def _layer_inputs(lo: Lowering, node: fx.Node) -> list[ir.Value]:
    bias = lo.optional(_argument(node, 2, "bias"))
    return [*lo.values_of(node.args[:2]), *([bias] if bias is not None else [])]


def _pads(padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """ONNX's (begins, ends); "same" puts the odd one at the end."""
    if not isinstance(padding, str):
        return _spread(padding, len(kernel)) * 2
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    return [t // 2 for t in total] + [t - t // 2 for t in total]


def _spread(value: int | Sequence[int], count: int) -> list[int]:
    """torch takes one number for all axes."""
    return [value] * count if isinstance(value, int) else [int(v) for v in value] * (count // len(value))


def _avg_pool(lo: Lowering, node: fx.Node) -> ir.Value:
    kernel = _spread(node.args[1], 2)  # type: ignore[arg-type]
    stride = _spread(_argument(node, 2, "stride") or kernel, 2)
    if _argument(node, 4, "ceil_mode", False) or _argument(node, 6, "divisor_override") is not None:
        raise ExportError(f"node {node.name}", "is a pooling with options", "Use plain average pooling.")
    return lo.builder.op(
        "AveragePool",
        lo.value(node.args[0]),
        kernel_shape=kernel,
        strides=stride,
        pads=_spread(_argument(node, 3, "padding", 0), 2) * 2,
        count_include_pad=int(bool(_argument(node, 5, "count_include_pad", True))),
        name=node.name,
    )


MATH: Translations = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _binary("Add")),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _binary("Sub")),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _binary("Mul", neutral=1)),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _binary("Div", neutral=1)),
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar), _binary("Pow")),
    **dict.fromkeys((aten.rsub.Scalar, aten.rsub.Tensor), _reverse_sub),
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.gt.Scalar: _compare("Greater"),
    aten.lt.Scalar: _compare("Less"),
    aten.ge.Scalar: _compare("GreaterOrEqual"),
    aten.le.Scalar: _compare("LessOrEqual"),
    aten.neg.default: _unary("Neg"),
    aten.abs.default: _unary("Abs"),
    aten.exp.default: _unary("Exp"),
    aten.log.default: _unary("Log"),
    aten.sin.default: _unary("Sin"),
    aten.cos.default: _unary("Cos"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.rsqrt.default: _rsqrt,
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.tanh.default: _unary("Tanh"),
    aten.sigmoid.default: _unary("Sigmoid"),
    **dict.fromkeys((aten.relu.default, aten.relu_.default), _unary("Relu")),
    aten.round.default: _unary("Round"),
    aten.floor.default: _unary("Floor"),
    aten.mish.default: _unary("Mish"),
    **dict.fromkeys((aten.silu.default, aten.silu_.default), _silu),
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.clamp.default: _clamp,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.mean.dim: _reduce("ReduceMean"),
    aten.sum.dim_IntList: _reduce("ReduceSum"),
    aten.where.self: _where,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
    **dict.fromkeys((aten.baddbmm.default, aten.addmm.default), _baddbmm),
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    aten.group_norm.default: _group_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.outer.default: _outer,
    aten.linear.default: _linear,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding), _conv),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input), _conv_transpose),
    aten.avg_pool2d.default: _avg_pool,
}
