"""The three kernels in plain torch: what they are compared with on a GPU, and what graphs are tested with on a CPU.

Signatures and layouts are those of `hqc.kernels`; sums are exact (float64 holds every integer below 2^53).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hqc.kernels import Epilogue, Weight
from hqc.ops import hadamard, rotate_codes

__all__ = ["hadamard_quantize", "int_conv2d", "int_gemm", "weight_values"]

_EXACT = torch.float64


def hadamard_quantize(
    x: Tensor, inverse_scale: Tensor, *, low: int, high: int, block: int = 1, nchw: bool = False, packed: bool = False
) -> Tensor:
    """q = clip(round((Ĥ·x)·inverse_scale[n]), low, high) in float32, channels last; see `hqc.kernels`."""
    rows = (x.movedim(1, -1) if nchw else x).to(torch.float32).contiguous()
    rotated = hadamard(rows, block, -1) if block > 1 else rows
    levels = rotated * inverse_scale.view(-1, *[1] * (x.ndim - 1))
    codes = levels.round_().clamp_(low, high).to(torch.int8)
    return _packed(codes) if packed else codes


def int_gemm(codes: Tensor, weight: Weight, scale: Tensor, epilogue: Epilogue = Epilogue()) -> Tensor:  # noqa: B008  (frozen)
    """y = acc·weight.scale[o]·scale[n] + bias[o] + residual, then SiLU; see `hqc.kernels`."""
    acc = functional.linear(codes.to(_EXACT), weight_values(weight, codes.shape[-1]).to(_EXACT))
    return _finished(acc, weight, scale, epilogue)


def int_conv2d(
    codes: Tensor,
    weight: Weight,
    scale: Tensor,
    epilogue: Epilogue = Epilogue(),  # noqa: B008  (frozen)
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """As `int_gemm` for codes [N, H, W, C] and a weight [O, kh, kw, C]; see `hqc.kernels`."""
    values = weight_values(weight, codes.shape[-1]).permute(0, 3, 1, 2)
    image = codes.permute(0, 3, 1, 2).to(_EXACT)
    acc = functional.conv2d(image, values.to(_EXACT), None, list(stride), list(padding), list(dilation))
    return _finished(acc.permute(0, 2, 3, 1), weight, scale, epilogue)


def weight_values(weight: Weight, channels: int) -> Tensor:
    """The integers that a kernel multiplies with: unpacked, rotated, digits summed; int32 [O, …, C]."""
    if not weight.packed:
        low = weight.codes.to(torch.int32)
        return low if weight.high is None else low + weight.high_factor * weight.high.to(torch.int32)
    nibbles = torch.stack([weight.codes & 0xF, weight.codes >> 4], -1).flatten(-2)[..., :channels].to(torch.int32)
    codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
    if weight.rotation == 1:
        return codes
    rotated: Tensor = rotate_codes(codes.movedim(-1, 1).to(torch.int8), weight.rotation)
    return rotated.movedim(1, -1).to(torch.int32)


def _finished(acc: Tensor, weight: Weight, scale: Tensor, epilogue: Epilogue) -> Tensor:
    """The same operations in the same order as `hqc::rescale`."""
    y = acc.to(torch.float32) * weight.scale
    samples = y.reshape(len(scale), -1, y.shape[-1]) * scale.view(-1, 1, 1)
    y = samples.view(y.shape)
    if epilogue.bias is not None:
        y = y + epilogue.bias
    if epilogue.residual is not None:
        y = y + epilogue.residual.to(torch.float32)
    if epilogue.silu:
        y = functional.silu(y)
    return y.to(epilogue.dtype).contiguous()


def _packed(codes: Tensor) -> Tensor:
    nibbles = codes.to(torch.int16) & 0xF
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).to(torch.uint8)
