"""Weights as the kernels read them: channels last, and four-bit codes two a byte."""

import torch
from torch import Tensor

from hqc.ops import rotate_codes

__all__ = ["channels_last", "pack_weight", "packed_weight_fits"]


def channels_last(weight: Tensor) -> Tensor:
    """[O, C, kh, kw] -> [O, kh, kw, C], contiguous; [O, C] as it is."""
    return weight.permute(0, 2, 3, 1).contiguous() if weight.ndim == 4 else weight.contiguous()


def pack_weight(codes: Tensor) -> Tensor:
    """Four-bit codes in -8…7, int8 […, C] with channels last -> uint8 […, ⌈C/2⌉], the first in the low nibble.

    Every line of channels starts at a byte: an odd one ends with a zero nibble.

    Raises:
        ValueError: if a code does not fit four bits.
    """
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"pack_weight: codes span {int(codes.min())}…{int(codes.max())}; expected -8…7")
    padded = torch.nn.functional.pad(codes.to(torch.int16) & 0xF, (0, codes.shape[-1] % 2))
    return (padded[..., 0::2] | (padded[..., 1::2] << 4)).to(torch.uint8)


def packed_weight_fits(codes: Tensor, block: int, regular: bool = False) -> bool:
    """Whether the kernels may rotate these codes: |codes·H_block| ≤ 127 everywhere.

    codes int8 [O, C, …] in -8…7, channels on axis 1.  Where this is false, use two int8 digits of the rotated codes.
    """
    if block <= 1:
        return True
    return int(rotate_codes(codes, block, regular).to(torch.int32).abs().max()) <= 127
