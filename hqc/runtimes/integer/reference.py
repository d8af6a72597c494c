"""The kernels in plain torch: what they are compared with on a GPU, and what graphs are tested with on a CPU.

Signatures and layouts are those of `hqc.kernels`; sums are exact (float64 holds every integer below 2^53).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hqc.bounds import clip_codes
from hqc.kernels import ColumnStatistics, Epilogue, GroupNorm, LayerNorm, Quantiser, Weight
from hqc.ops import hadamard, rotate_codes

__all__ = [
    "column_statistics",
    "gate_quantize",
    "group_norm_quantize",
    "hadamard_quantize",
    "int_conv2d",
    "int_conv2d_statistics",
    "int_gemm",
    "int_gemm_statistics",
    "layer_norm_quantize",
    "weight_values",
    "wide_attention",
]

EXACT = torch.float64
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def hadamard_quantize(
    x: Tensor,
    inverse_scale: Tensor,
    *,
    low: int | None,
    high: int | None,
    block: int = 1,
    regular: bool = False,
    nchw: bool = False,
    packed: bool = False,
    second: Tensor | None = None,
) -> Tensor:
    """q = clip(round((Ĥ·x)·inverse_scale[n]), low, high) in float32, channels last; see `hqc.kernels`."""
    whole = x if second is None else torch.cat([x, second], -1)
    rows = (whole.movedim(1, -1) if nchw else whole).to(torch.float32).contiguous()
    codes = _codes(rows, Quantiser(inverse_scale, low, high, block, regular))
    return _packed(codes) if packed else codes


def column_statistics(x: Tensor) -> ColumnStatistics:
    """Mean and squared deviations of every channel, a sample in one block; see `hqc.kernels`."""
    rows = x.flatten(1, -2).to(torch.float32)
    mean = rows.mean(1, keepdim=True)
    values = torch.stack([mean.squeeze(1), (rows - mean).square().sum(1)], 1)
    return ColumnStatistics(values[:, None], rows.shape[1])


def group_norm_quantize(
    x: Tensor,
    norm: GroupNorm,
    quantiser: Quantiser | None,
    *,
    second: Tensor | None = None,
    statistics: ColumnStatistics | None = None,
    second_statistics: ColumnStatistics | None = None,
    keep: bool = False,
    beside: Quantiser | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(codes, y, codes of x), y the group norm of x in float32, then SiLU; see `hqc.kernels`.

    Statistics are taken anew.
    """
    whole = x if second is None else torch.cat([x, second], -1)
    image = whole.to(torch.float32).movedim(-1, 1)
    normed = functional.group_norm(image, norm.groups, norm.weight, norm.bias, norm.eps)
    y = (functional.silu(normed) if norm.silu else normed).movedim(1, -1).contiguous()
    codes = None if quantiser is None else _codes(y, quantiser)
    other = None if beside is None else _codes(whole.to(torch.float32).contiguous(), beside)
    return codes, y.to(x.dtype) if keep or quantiser is None else None, other


def layer_norm_quantize(
    x: Tensor, norm: LayerNorm, quantiser: Quantiser, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(codes, y), y the layer norm of x in float32; see `hqc.kernels`."""
    y = functional.layer_norm(x.to(torch.float32), x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return _codes(y, quantiser), y.to(x.dtype) if keep else None


def gate_quantize(x: Tensor, quantiser: Quantiser, *, kind: str, gated: bool) -> Tensor:
    """Codes of a·f(g), or of f(x), in float32; see `hqc.kernels`."""
    wide = x.to(torch.float32)
    if not gated:
        return _codes(_ACTIVATIONS[kind](wide), quantiser)
    a, g = wide.chunk(2, -1)
    return _codes(a * _ACTIVATIONS[kind](g), quantiser)


def wide_attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, scale: float | None = None, quantiser: Quantiser | None = None
) -> Tensor:
    """softmax(q·kᵀ·scale)·v for each head in float32, or its codes; see `hqc.kernels`."""
    a, b, c = (t.to(torch.float32).view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    y = functional.scaled_dot_product_attention(a, b, c, scale=scale).transpose(1, 2).flatten(2)
    return y.to(q.dtype) if quantiser is None else _codes(y.contiguous(), quantiser)


def int_gemm(codes: Tensor, weight: Weight, scale: Tensor, epilogue: Epilogue = Epilogue()) -> Tensor:  # noqa: B008  (frozen)
    """y = acc·weight.scale[o]·scale[n] + bias[o] + shift[n, o] + residual, SiLU, gate, codes; see `hqc.kernels`."""
    acc = functional.linear(codes.to(EXACT), weight_values(weight, codes.shape[-1]).to(EXACT))
    return _finished(acc, weight, scale, epilogue)


def int_gemm_statistics(
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue = Epilogue(),  # noqa: B008  (frozen)
) -> tuple[Tensor, ColumnStatistics]:
    """`int_gemm` and the statistics of its output; see `hqc.kernels`."""
    y = int_gemm(codes, weight, scale, epilogue)
    return y, column_statistics(y)


def int_conv2d(
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue = Epilogue(),  # noqa: B008  (frozen)
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    upsample: int = 1,
) -> Tensor:
    """As `int_gemm` for codes [N, H, W, C] and a weight [O, kh, kw, C]; see `hqc.kernels`."""
    values = weight_values(weight, codes.shape[-1]).permute(0, 3, 1, 2)
    image = codes.repeat_interleave(upsample, 1).repeat_interleave(upsample, 2).permute(0, 3, 1, 2).to(EXACT)
    acc = functional.conv2d(image, values.to(EXACT), None, list(stride), list(padding), list(dilation))
    return _finished(acc.permute(0, 2, 3, 1), weight, scale, epilogue)


def int_conv2d_statistics(
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue = Epilogue(),  # noqa: B008  (frozen)
    **window: Any,
) -> tuple[Tensor, ColumnStatistics]:
    """`int_conv2d` and the statistics of its output; see `hqc.kernels`."""
    y = int_conv2d(codes, weight, scale, epilogue, **window)
    return y, column_statistics(y)


def weight_values(weight: Weight, channels: int) -> Tensor:
    """The integers that a kernel multiplies with: unpacked, rotated, digits summed; int32 [O, …, C]."""
    if not weight.packed:
        low = weight.codes.to(torch.int32)
        return low if weight.high is None else low + weight.high_factor * weight.high.to(torch.int32)
    nibbles = torch.stack([weight.codes & 0xF, weight.codes >> 4], -1).flatten(-2)[..., :channels].to(torch.int32)
    codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
    if weight.rotation == 1:
        return codes
    rotated: Tensor = rotate_codes(codes.movedim(-1, 1).to(torch.int8), weight.rotation, weight.regular)
    return rotated.movedim(1, -1).to(torch.int32)


def _finished(acc: Tensor, weight: Weight, scale: Tensor, epilogue: Epilogue) -> Tensor:
    """The same operations in the same order as `hqc::rescale`."""
    y = acc.to(torch.float32) * weight.scale
    samples = y.reshape(len(scale), -1, y.shape[-1]) * scale.view(-1, 1, 1)
    if epilogue.bias is not None:
        samples = samples + epilogue.bias
    if epilogue.shift is not None:
        samples = samples + epilogue.shift.to(torch.float32)[:, None]
    y = samples.view(y.shape)
    if epilogue.residual is not None:
        y = y + epilogue.residual.to(torch.float32)
    if epilogue.silu:
        y = functional.silu(y)
    if epilogue.gate != "none":
        a, g = y[..., 0::2], y[..., 1::2]
        y = a * _ACTIVATIONS[epilogue.gate](g)
    if epilogue.quantiser is not None:
        return _codes(y.contiguous(), epilogue.quantiser)
    return y.to(epilogue.dtype).contiguous()


def _codes(rows: Tensor, quantiser: Quantiser) -> Tensor:
    """Codes of float32 rows [N, …, C]."""
    rotated = hadamard(rows, quantiser.block, -1, quantiser.regular) if quantiser.block > 1 else rows
    inverse, low, high = quantiser.inverse_scale, quantiser.low, quantiser.high
    if low is None:
        inverse, low, high = inverse.unbind(1)  # type: ignore[assignment]
    levels = rotated * inverse.view(-1, *[1] * (rows.ndim - 1))
    return clip_codes(levels.round_(), low, high).to(torch.int8)


def _packed(codes: Tensor) -> Tensor:
    nibbles = codes.to(torch.int16) & 0xF
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).to(torch.uint8)
