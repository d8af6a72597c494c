"""oneDNN's integer operators as this torch has them, and what they add their products up in."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hqc.errors import RuntimeMissingError

__all__ = [
    "INT16_LIMIT",
    "NAME",
    "ZERO",
    "adds_in_int16",
    "convolve",
    "multiply",
    "output_size",
    "pack_convolution",
    "pack_linear",
    "require_operators",
]

NAME = "runtime torch-int8"
_USUAL_BATCH = 2
"""One image with guidance; hardly any layout depends on it."""
ZERO = 128
"""Of unsigned activation codes: the code that is real 0, and what padding is."""
INT16_LIMIT = 2**15 - 1
_NEEDED = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")
_DO = "Use runtime='torch', or an export in ONNX Runtime."
Window = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Stride, padding and dilation, each (height, width)."""


def output_size(size: Sequence[int], kernel: Sequence[int], window: Window) -> list[int]:
    """Height and width of what a convolution gives.

    >>> output_size((8, 7), (3, 3), ((2, 2), (1, 1), (1, 1)))
    [4, 4]
    """
    along = zip(size, kernel, *window, strict=True)
    return [
        (length + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for length, k, stride, padding, dilation in along
    ]


def require_operators() -> None:
    """Refuses to go on without oneDNN's operators, or where they give other sums than integers have.

    Raises:
        RuntimeMissingError: saying whether torch, its settings or the CPU lacks them.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise RuntimeMissingError(NAME, "this torch was built without oneDNN", _DO)
    if not torch.backends.mkldnn.enabled:  # type: ignore[attr-defined]
        found = "oneDNN is switched off (torch.backends.mkldnn.enabled)"
        raise RuntimeMissingError(NAME, found, "Switch it on, or use runtime='torch'.")
    missing = [name for name in _NEEDED if not hasattr(torch.ops.onednn, name)]
    if missing:
        raise RuntimeMissingError(NAME, f"this torch has no operator onednn::{missing[0]}", _DO)
    try:
        right = _sums_right(64)
    except RuntimeError as error:
        raise RuntimeMissingError(NAME, "oneDNN has no u8 x s8 products for this CPU", _DO) from error
    if not right:
        raise RuntimeMissingError(NAME, "oneDNN's u8 x s8 products are not exact on this CPU", _DO)


@cache
def adds_in_int16() -> bool:
    """Whether two neighbouring products are added in int16, which saturates: x86 without VNNI. Tried, not looked up."""
    return not _sums_right(127)


def _sums_right(weight: int) -> bool:
    """Whether a linear and a convolution of the largest activation codes with weights of ±`weight` come out exact."""
    channels, outputs = 64, 32
    codes = torch.full((2, 4, 4, channels), 255, dtype=torch.uint8)
    weights = torch.full((outputs, channels, 3, 3), weight, dtype=torch.int8)
    weights[::2] = -weights[::2]
    scale = torch.ones(outputs)
    flat = weights[..., 1, 1].contiguous()
    linear = multiply(codes, pack_linear(flat), scale, 1.0, None)
    window: Window = ((1, 1), (0, 0), (1, 1))
    image = convolve(codes, pack_convolution(weights, scale, window, (4, 4)), scale, 1.0, None, window)
    wanted = flat[:, 0].to(torch.float32) * (255 - ZERO) * channels
    return bool((linear == wanted).all() and (image == wanted * 9).all())


def pack_linear(weight: Tensor) -> Tensor:
    """An int8 weight [O, C] in oneDNN's own layout."""
    return torch.ops.onednn.qlinear_prepack(weight, None)  # type: ignore[no-any-return]


def pack_convolution(weight: Tensor, scale: Tensor, window: Window, size: Sequence[int]) -> Tensor:
    """An int8 weight [O, C, h, w] in oneDNN's own layout, which it chooses by the size (height, width) of the image.

    For an image of another size it may want another, and lay the weight out anew in every call.
    """
    stride, padding, dilation = map(list, window)
    image = [_USUAL_BATCH, weight.shape[1], *size]
    return torch.ops.onednn.qconv_prepack(  # type: ignore[no-any-return]
        weight, scale, 1.0, ZERO, stride, padding, dilation, 1, image
    )


@cache
def _no_zero(outputs: int) -> Tensor:
    """Weights have no zero point."""
    return torch.zeros(outputs, dtype=torch.int32)


def multiply(codes: Tensor, packed: Tensor, scale: Tensor, factor: float, bias: Tensor | None) -> Tensor:
    """(codes - 128)·Wᵀ·scale[o]·factor + bias[o]; codes u8 [N, …, C] -> float32 [N, …, O]."""
    zero = _no_zero(len(scale))
    run: Any = torch.ops.onednn.qlinear_pointwise.default
    return run(  # type: ignore[no-any-return]
        codes, factor, ZERO, packed, scale, zero, bias, 1.0, 0, torch.float32, "none", [], ""
    )


def convolve(
    codes: Tensor, packed: Tensor, scale: Tensor, factor: float, bias: Tensor | None, window: Window
) -> Tensor:
    """The same of a convolution; codes u8 [N, H, W, C] -> float32 [N, H', W', O]."""
    stride, padding, dilation = map(list, window)
    zero = _no_zero(len(scale))
    run: Any = torch.ops.onednn.qconv2d_pointwise.default
    image = codes.permute(0, 3, 1, 2)
    operands = (image, factor, ZERO, packed, scale, zero, bias, stride, padding, dilation)
    y: Tensor = run(*operands, 1, 1.0, 0, torch.float32, "none", [], "")
    return y.permute(0, 2, 3, 1)
