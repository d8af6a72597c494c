"""Which operators a Program may call: the ones that capture and the passes make, and what is left out on purpose.

A Program may come from a stranger, so this is a list of what is allowed. An operator belongs here if it is a pure
function of its arguments, draws no random numbers, and checks what it indexes itself: on the CPU `embedding`,
`index_select`, `gather` and `index` refuse an index out of range. Left out are those that trust their arguments
(`as_strided`, `_reshape_alias`, `_unsafe_index`, `native_group_norm`, `embedding_bag`, everything `_backward`), whose
results have a size that depends on values (`nonzero`, `masked_select`, `repeat_interleave` by a tensor), and whose
results depend on memory (`empty`, unless nothing reads it). `RULES` holds what an operator's schema does not say.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hqc.rotations import ORDERS, Rotation

__all__ = ["ADMITTED", "RULES", "admitted_name"]


def _overloads(text: str) -> frozenset[str]:
    """`add.Tensor add.Scalar relu` -> aten.add.Tensor, aten.add.Scalar, aten.relu.default."""
    return frozenset(f"aten.{name}" if "." in name else f"aten.{name}.default" for name in text.split())


_ARITHMETIC = _overloads("""
    add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar mul.Tensor mul.Scalar
    div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode floor_divide floor_divide.Scalar true_divide.Tensor
    remainder.Tensor remainder.Scalar fmod.Tensor fmod.Scalar multiply.Tensor
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar maximum minimum atan2 lerp.Scalar lerp.Tensor addcmul addcdiv
    eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar
    ge.Tensor ge.Scalar logical_and logical_or logical_not logical_xor
    bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_not
    where.self where.ScalarSelf where.ScalarOther where.Scalar masked_fill.Scalar masked_fill.Tensor
    clamp clamp.Tensor clamp_min clamp_max clip nan_to_num isnan isinf isfinite
""")
_ELEMENTWISE = _overloads("""
    abs neg sign square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh
    asin acos atan erf ceil floor round round.decimals trunc frac
    relu relu6 leaky_relu elu selu celu gelu glu silu mish sigmoid log_sigmoid softplus hardtanh hardswish
    hardsigmoid prelu softmax.int _softmax log_softmax.int _log_softmax
""")
_REDUCTIONS = _overloads("""
    mean mean.dim sum sum.dim_IntList prod.dim_int amax amin max max.dim min min.dim argmax argmin aminmax
    var var.dim var.correction std std.dim std.correction var_mean.correction norm.ScalarOpt_dim linalg_vector_norm
    logsumexp cumsum cumprod any any.dim all all.dim
""")
_PRODUCTS = _overloads("""
    mm bmm mv dot matmul addmm baddbmm outer einsum linear scaled_dot_product_attention
    conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding convolution
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input
    group_norm layer_norm native_layer_norm rms_norm batch_norm cosine_similarity
""")
_SHAPES = _overloads("""
    view reshape _unsafe_view view_as reshape_as flatten.using_ints unflatten.int unsqueeze squeeze squeeze.dim
    squeeze.dims expand expand_as broadcast_to repeat tile permute transpose.int swapaxes movedim.int movedim.intlist
    t numpy_T mT cat concat stack chunk split.Tensor split.sizes split_with_sizes tensor_split.sections unbind.int
    meshgrid meshgrid.indexing repeat_interleave.self_int slice.Tensor select.int narrow index_select embedding gather
    index.Tensor flip roll tril triu
    pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
    upsample_nearest1d upsample_nearest1d.vec upsample_nearest2d upsample_nearest2d.vec upsample_nearest3d.vec
    _upsample_nearest_exact2d _upsample_nearest_exact2d.vec upsample_bilinear2d upsample_bilinear2d.vec
    upsample_bicubic2d upsample_bicubic2d.vec upsample_linear1d upsample_linear1d.vec
    pixel_shuffle pixel_unshuffle channel_shuffle
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d max_pool1d max_pool2d
    sym_size.int sym_numel
""")
_COPIES = _overloads("""
    contiguous clone alias detach lift_fresh_copy dropout feature_dropout
    to.dtype to.dtype_layout to.device to.other _to_copy type_as
""")
_MAKERS = _overloads("""
    arange arange.start arange.start_step linspace full ones zeros ones_like zeros_like full_like
    new_zeros new_ones new_full scalar_tensor empty.memory_format
""")
# What the passes make; the shape rules of `hqc::` operators check little, so each has a rule of its own below.
_OWN = frozenset(
    f"hqc.{name}.default"
    for name in (
        *("hadamard", "fake_quantize", "nearest_timestep", "quantize", "dequantize"),
        *("fake_quantize_bounded", "fake_quantize_residual", "quantize_bounded", "round_ste", "softmax_quantize"),
        *("dynamic_scale", "fake_quantize_grouped", "quantize_grouped", "dequantize_grouped"),
        *("unpack_int4", "lookup", "rotate_codes", "digit", "half", "int_linear", "int_conv2d", "rescale"),
    )
)

ADMITTED: frozenset[str] = _ARITHMETIC | _ELEMENTWISE | _REDUCTIONS | _PRODUCTS | _SHAPES | _COPIES | _MAKERS | _OWN
"""Every operator that a Program may call, as `namespace.name.overload`; see docs/add-an-op.md."""


def admitted_name(target: object) -> bool:
    """Whether an operator overload is on the list."""
    return isinstance(target, torch._ops.OpOverload) and str(target) in ADMITTED


# ---- what a schema does not say: each rule takes the arguments by name and gives what is wrong, or nothing -----------

Arguments = Mapping[str, Any]
Rule = Callable[[Arguments], str]

_MOST_PARTS = 4096
_CODES = (torch.int8, torch.int16)
_LARGEST_CODE = 2**15
_LARGEST_GROUP = 2**24


def _parts(count: Callable[[int, Arguments], int]) -> Rule:
    """An operator that gives a list: one of a million views would take minutes."""

    def rule(given: Arguments) -> str:
        x, dim = given["self"], given["dim"]
        if not isinstance(x, Tensor) or type(dim) is not int or not -x.ndim <= dim < x.ndim:
            return f"cuts along axis {dim!r}, which its input does not have"
        found = count(x.shape[dim], given)
        return "" if 0 < found <= _MOST_PARTS else f"makes {found} parts; expected 1 to {_MOST_PARTS}"

    return rule


def _pieces(size: int, given: Arguments) -> int:
    step = given["split_size"]
    return -(-size // step) if isinstance(step, int) and step > 0 else 0


def _sections(name: str) -> Callable[[int, Arguments], int]:
    return lambda size, given: given[name] if isinstance(given[name], int) else 0


def _no_dropout(given: Arguments) -> str:
    return "drops out at random" if given["train"] and given["p"] != 0 else ""


def _not_training(given: Arguments) -> str:
    return "updates its statistics" if given["training"] else ""


def _attention(given: Arguments) -> str:
    """Kernels of attention check shapes less strictly than a product does."""
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    if given["dropout_p"] != 0:
        return "drops out at random"
    if not query.ndim == key.ndim == value.ndim or query.ndim < 3:
        return f"has operands of {query.ndim}, {key.ndim} and {value.ndim} axes"
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2] or key.shape[:-2] != value.shape[:-2]:
        return f"has operands {list(query.shape)}, {list(key.shape)}, {list(value.shape)} that do not fit each other"
    if mask is None:
        return ""
    scores = (*query.shape[:-1], key.shape[-2])
    fits = mask.ndim <= len(scores) and all(m in (1, s) for m, s in zip(mask.shape[::-1], scores[::-1], strict=False))
    return "" if fits else f"has a mask {list(mask.shape)} for scores {list(scores)}"


def _looked_up(index: str) -> Rule:
    return lambda given: "" if not given[index].is_floating_point() else "looks up by numbers that are not whole"


def _embedding(given: Arguments) -> str:
    if given["scale_grad_by_freq"] or given["sparse"]:
        return "has options of training"
    return _looked_up("indices")(given)


def _codes_range(given: Arguments) -> str:
    low, high = given["qmin"], given["qmax"]
    if not -128 <= low < high <= 127:
        return f"has codes {low}…{high}; expected some of -128…127"
    return _scale_per_row(given["x"], given["scale"])


def _scale_per_row(x: Tensor, scale: Tensor) -> str:
    if x.ndim < 1 or tuple(scale.shape) != (x.shape[0],) or not scale.is_floating_point():
        return f"has scales {list(scale.shape)} for a value {list(x.shape)}; expected one for each row"
    return ""


def _quantiser(given: Arguments) -> str:
    return _codes_range(given) or ("" if given["x"].is_floating_point() else "quantises whole numbers")


def _bounded_quantiser(given: Arguments) -> str:
    """Whether the bounds' values fit int8, no shape says: `hqc/structure.py` looks at what is stored."""
    x = given["x"]
    if not x.is_floating_point():
        return "quantises whole numbers"
    if found := _scale_per_row(x, given["scale"]):
        return found
    for name in ("low", "high"):
        bound = given[name]
        if tuple(bound.shape) != (x.shape[0],) or not bound.is_floating_point():
            return f"has bounds {list(bound.shape)} for a value {list(x.shape)}; expected one for each row"
    return ""


def _residual_quantiser(given: Arguments) -> str:
    step, rows = given["step"], given["x"].shape[:1]
    if found := _bounded_quantiser(given):
        return found
    fits = step.is_floating_point() and tuple(step.shape) == tuple(rows)
    return "" if fits else f"has steps {list(step.shape)}; expected one real number for each of {list(rows)} rows"


def _by_group(x: Tensor, axis: Any, group: Any) -> str:
    if x.ndim < 2 or axis not in (1, -1, x.ndim - 1):
        return f"groups axis {axis} of {x.ndim}; expected 1 or the last"
    return "" if type(group) is int and 0 < group < _LARGEST_GROUP else f"has groups of {group!r}"


def _scale_per_group(x: Tensor, given: Arguments) -> str:
    scale, axis, group = given["scale"], given["axis"], given["group"]
    if found := _by_group(x, axis, group):
        return found
    wanted = list(x.shape)
    wanted[axis] = -(-wanted[axis] // group)
    if list(scale.shape) != wanted or not scale.is_floating_point():
        return f"has scales {list(scale.shape)} for groups of {group} of {list(x.shape)}; expected {wanted}"
    return ""


def _dynamic_scale(given: Arguments) -> str:
    if not given["x"].is_floating_point():
        return "measures whole numbers"
    if not 0 < given["qmax"] <= 127:
        return f"has codes up to {given['qmax']}; expected some of 1…127"
    return _by_group(given["x"], given["axis"], given["group"])


def _grouped_quantiser(given: Arguments) -> str:
    low, high = given["qmin"], given["qmax"]
    if not -128 <= low < high <= 127:
        return f"has codes {low}…{high}; expected some of -128…127"
    return _scale_per_group(given["x"], given) or ("" if given["x"].is_floating_point() else "quantises whole numbers")


def _grouped_dequantiser(given: Arguments) -> str:
    return _scale_per_group(given["q"], given) if given["q"].dtype in _CODES else f"dequantises {given['q'].dtype}"


def _from_table(given: Arguments) -> str:
    codes, table = given["codes"], given["table"]
    if codes.dtype != torch.int8 or not table.is_floating_point():
        return f"looks up {codes.dtype} in {table.dtype}; expected int8 in real numbers"
    if table.ndim != 2 or codes.ndim < 2 or table.shape[0] != codes.shape[0] or table.shape[1] not in (4, 8, 16):
        return f"looks up {list(codes.shape)} in {list(table.shape)}; expected a table of 4, 8 or 16 for each row"
    return ""


def _softmax_quantiser(given: Arguments) -> str:
    p, log2, bits = given["p"], given["log2"], given["bits"]
    if not p.is_floating_point():
        return "quantises whole numbers"
    if not 2 <= bits <= 8:
        return f"has {bits} bits; expected 2 to 8"
    if tuple(log2.shape) != tuple(p.shape[:1]) or not log2.is_floating_point():
        return f"has kinds of steps {list(log2.shape)} for a value {list(p.shape)}; expected one for each row"
    return _scale_per_row(p, given["scale"])


def _rounded(given: Arguments) -> str:
    return "" if given["x"].is_floating_point() else "rounds whole numbers"


def _dequantiser(given: Arguments) -> str:
    if given["q"].dtype not in _CODES:
        return f"dequantises {given['q'].dtype}"
    return _scale_per_row(given["q"], given["scale"])


def _hadamard(given: Arguments) -> str:
    x, block, axis = given["x"], given["block"], given["axis"]
    if x.ndim < 2 or axis not in (1, -1, x.ndim - 1):
        return f"rotates axis {axis} of {x.ndim}; expected 1 or the last"
    if axis == 1 and x.ndim == 2:
        axis = -1
    return _block(x.shape[axis], block, given["regular"]) or ("" if x.is_floating_point() else "rotates whole numbers")


def _block(channels: int, block: int, regular: bool) -> str:
    if block not in ORDERS[Rotation(block, regular).kind] or channels % block:
        return f"rotates {channels} channels in {'regular ' if regular else ''}blocks of {block!r}"
    return ""


def _rotated_codes(given: Arguments) -> str:
    codes = given["codes"]
    if codes.ndim < 2 or codes.dtype != torch.int8:
        return f"rotates {codes.dtype} {list(codes.shape)}; expected int8 [O, C, …]"
    return _block(codes.shape[1], given["block"], given["regular"])


def _part(given: Arguments) -> str:
    if given["codes"].dtype not in (*_CODES, torch.int32):
        return f"takes a digit of {given['codes'].dtype}"
    return "" if given["index"] in (0, 1) else f"asks for digit {given['index']!r}; expected 0 or 1"


def _unpacked(given: Arguments) -> str:
    packed, shape = given["packed"], given["shape"]
    if packed.dtype != torch.uint8 or packed.ndim != 1 or not all(type(d) is int and d > 0 for d in shape):
        return f"unpacks {packed.dtype} {list(packed.shape)} into {list(shape)}"
    count = math.prod(shape)
    return "" if packed.numel() == -(-count // 2) else f"unpacks {packed.numel()} bytes into {count} codes"


def _nearest(given: Arguments) -> str:
    timestep, grid = given["timestep"], given["grid"]
    fits = timestep.ndim == grid.ndim == 1 and grid.numel() > 0 and grid.is_floating_point()
    return "" if fits else f"looks up {list(timestep.shape)} in a grid {list(grid.shape)}"


def _product(given: Arguments) -> str:
    q, weight, top = given["q"], given["weight"], given["qmax"]
    if q.dtype != torch.int8 or weight.dtype not in _CODES or not 0 < top < _LARGEST_CODE:
        return f"multiplies {q.dtype} up to {top} by {weight.dtype}; expected int8 by int8 or int16"
    return ""


def _int_linear(given: Arguments) -> str:
    q, weight = given["q"], given["weight"]
    if weight.ndim != 2 or q.ndim < 2 or q.shape[-1] != weight.shape[1]:
        return f"multiplies {list(q.shape)} by {list(weight.shape)}"
    return _product(given)


def _int_conv2d(given: Arguments) -> str:
    q, weight = given["q"], given["weight"]
    pairs = [given[name] for name in ("stride", "padding", "dilation")]
    if weight.ndim != 4 or q.ndim != 4 or q.shape[1] != weight.shape[1]:
        return f"convolves {list(q.shape)} by {list(weight.shape)}"
    for pair, least in zip(pairs, (1, 0, 1), strict=True):
        if len(pair) != 2 or not all(type(n) is int and least <= n < _LARGEST_CODE for n in pair):
            return f"has a stride, padding or dilation of {list(pair)}"
    _, padding, dilation = pairs
    spans = [q.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) for i in range(2)]
    return _product(given) if min(spans) > 0 else f"has a kernel larger than its input {list(q.shape)}"


def _rescale(given: Arguments) -> str:
    acc, axis, bias = given["acc"], given["channel_axis"], given["bias"]
    if acc.ndim < 2 or axis not in (1, -1) or acc.dtype != torch.int32:
        return f"rescales {acc.dtype} {list(acc.shape)} along axis {axis!r}"
    wanted = {"scale_activation": (acc.shape[0],), "scale_weight": (acc.shape[axis],)}
    if bias is not None:
        wanted["bias"] = (acc.shape[axis],)
    for name, shape in wanted.items():
        if tuple(given[name].shape) != shape or given[name].dtype != torch.float32:
            return f"has a {name} {list(given[name].shape)}; expected float32 {list(shape)}"
    return ""


RULES: Mapping[str, Rule] = {
    "aten.split.Tensor": _parts(_pieces),
    "aten.chunk.default": _parts(_sections("chunks")),
    "aten.tensor_split.sections": _parts(_sections("sections")),
    "aten.unbind.int": _parts(lambda size, given: size),
    "aten.dropout.default": _no_dropout,
    "aten.feature_dropout.default": _no_dropout,
    "aten.batch_norm.default": _not_training,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.embedding.default": _embedding,
    "aten.index_select.default": _looked_up("index"),
    "hqc.hadamard.default": _hadamard,
    "hqc.fake_quantize.default": _quantiser,
    "hqc.quantize.default": _quantiser,
    "hqc.fake_quantize_bounded.default": _bounded_quantiser,
    "hqc.fake_quantize_residual.default": _residual_quantiser,
    "hqc.quantize_bounded.default": _bounded_quantiser,
    "hqc.softmax_quantize.default": _softmax_quantiser,
    "hqc.round_ste.default": _rounded,
    "hqc.dequantize.default": _dequantiser,
    "hqc.nearest_timestep.default": _nearest,
    "hqc.dynamic_scale.default": _dynamic_scale,
    "hqc.fake_quantize_grouped.default": _grouped_quantiser,
    "hqc.quantize_grouped.default": _grouped_quantiser,
    "hqc.dequantize_grouped.default": _grouped_dequantiser,
    "hqc.unpack_int4.default": _unpacked,
    "hqc.lookup.default": _from_table,
    "hqc.rotate_codes.default": _rotated_codes,
    "hqc.digit.default": _part,
    "hqc.half.default": _part,
    "hqc.int_linear.default": _int_linear,
    "hqc.int_conv2d.default": _int_conv2d,
    "hqc.rescale.default": _rescale,
}
"""What is wrong with a call whose arguments the schema admits."""
