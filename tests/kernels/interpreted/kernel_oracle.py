"""What the kernels must compute, in numpy int64 and float64, written apart from hqc: popcount, loops over taps.

Also memory around tensors that must be neither read nor written: `fenced` puts a tensor between poisoned rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Fence", "conv_sums", "fenced", "levels", "product_sums", "regular_signs", "rotated", "signs"]

FENCE = 64
"""Elements of poison before and after; 64 elements keep the alignment that a whole allocation has."""


def signs(order: int, *, regular: bool = False) -> np.ndarray:
    """H[i, j] = (-1)^popcount(i & j): the closed form, not the recursion; the regular one by pairs of bits of i ^ j."""
    if regular:
        return regular_signs(order)
    return np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(order)] for i in range(order)], dtype=np.int64)


def regular_signs(order: int) -> np.ndarray:
    """H ±1 of an order 4^k or 2·4^k; of the second the lowest bit is Sylvester's."""
    lone = order.bit_length() % 2 == 0
    pairs = sum(1 << bit for bit in range(int(lone), order.bit_length() - 1, 2))
    parity = [
        [((i ^ j) & ((i ^ j) >> 1) & pairs).bit_count() + (i & j & int(lone)) for j in range(order)]
        for i in range(order)
    ]
    return 1 - 2 * (np.array(parity, dtype=np.int64) % 2)


def rotated(weight: np.ndarray, block: int, *, regular: bool = False) -> np.ndarray:
    """w·H along the last axis, block by block, in int64."""
    blocks = weight.astype(np.int64).reshape(*weight.shape[:-1], -1, block)
    return (blocks @ signs(block, regular=regular)).reshape(weight.shape)


def levels(x: Tensor, inverse_scale: Tensor, block: int, *, regular: bool = False) -> np.ndarray:
    """((H·x)/√b)·inverse_scale[n] in float64; x [N, …, C]."""
    values = x.to(torch.float64).numpy()
    blocks = values.reshape(*values.shape[:-1], -1, block)
    turned = (blocks @ signs(block, regular=regular).astype(np.float64) / np.sqrt(block)).reshape(values.shape)
    return turned * inverse_scale.to(torch.float64).numpy().reshape(-1, *[1] * (x.ndim - 1))


def product_sums(codes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Σ_c codes[…, c]·weight[o, c] in int64, one channel at a time."""
    acc = np.zeros((*codes.shape[:-1], weight.shape[0]), dtype=np.int64)
    for c in range(codes.shape[-1]):
        acc += codes[..., c, None].astype(np.int64) * weight[:, c].astype(np.int64)
    return acc


def conv_sums(
    codes: np.ndarray, weight: np.ndarray, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> np.ndarray:
    """The same for codes [N, H, W, C] and weight [O, kh, kw, C], padded with 0, one tap at a time."""
    samples, height, width, channels = codes.shape
    outputs, kh, kw, _ = weight.shape
    padded = np.zeros((samples, height + 2 * padding[0], width + 2 * padding[1], channels), dtype=np.int64)
    padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = codes
    rows = (padded.shape[1] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (padded.shape[2] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    acc = np.zeros((samples, rows, columns, outputs), dtype=np.int64)
    for y in range(kh):
        for x in range(kw):
            top, left = y * dilation[0], x * dilation[1]
            taps = padded[:, top : top + rows * stride[0] : stride[0], left : left + columns * stride[1] : stride[1]]
            acc += product_sums(taps, weight[:, y, x])
    return acc


class Fence:
    """A contiguous tensor with poison on both sides of it; `intact()` says whether the poison still stands."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, poison: float, device: str) -> None:
        self._poison = poison
        count = int(np.prod(shape))
        self._memory = torch.full((count + 2 * FENCE,), poison, dtype=dtype, device=device)
        self.tensor = self._memory[FENCE : FENCE + count].view(tuple(shape))

    def intact(self) -> bool:
        """Whether nothing was written beside the tensor."""
        sides = torch.cat([self._memory[:FENCE], self._memory[-FENCE:]])
        return bool(torch.isnan(sides).all()) if np.isnan(self._poison) else bool((sides == self._poison).all())


def fenced(tensor: Tensor, poison: float, device: str) -> Tensor:
    """The same values between poison: whatever reads past them computes with it."""
    fence = Fence(tensor.shape, tensor.dtype, poison, device)
    fence.tensor.copy_(tensor)
    return fence.tensor
