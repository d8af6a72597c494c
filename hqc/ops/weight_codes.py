"""Weight codes: `hqc::unpack_int4`, `hqc::rotate_codes`, `hqc::digit`, `hqc::half`; all exact in integers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hqc.ops.hadamard import hadamard_matrix
from hqc.rotations import Rotation

__all__ = ["DIGIT_BASE", "digit", "fits_int4", "half", "int4_offsets", "pack_int4", "rotate_codes", "unpack_int4"]

DIGIT_BASE = 128


def fits_int4(codes: Tensor) -> bool:
    """Whether all codes lie in -8…7."""
    return codes.numel() > 0 and int(codes.min()) >= -8 and int(codes.max()) <= 7


def int4_offsets(codes: Tensor) -> tuple[Tensor, Tensor]:
    """By output channel of int8 codes [O, …]: an int8 offset, and whether codes less the offset lie in -8…7.

    Codes q - z of an asymmetric range of four bits do: they span 16 numbers at most, wherever these lie.
    """
    low, high = codes.flatten(1).to(torch.int16).aminmax(dim=1)
    return (low + 8).clamp_max(127).to(torch.int8), high - low <= 15


def pack_int4(codes: Tensor) -> Tensor:
    """Packs int8 codes in -8…7, two a byte, the first in the low nibble; flattened, odd counts padded with 0."""
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < -8 or int(flat.max()) > 7):
        raise ValueError(f"pack_int4: codes span {int(flat.min())}…{int(flat.max())}; expected -8…7")
    nibbles = torch.nn.functional.pad(flat.to(torch.int16) & 0xF, (0, flat.numel() % 2)).view(-1, 2)
    return (nibbles[:, 0] | (nibbles[:, 1] << 4)).to(torch.uint8)


@torch.library.custom_op("hqc::unpack_int4", mutates_args=())
def unpack_int4(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """int8 codes of the given shape from `pack_int4`'s bytes: packed uint8 [⌈n/2⌉] -> int8 shape."""
    # The sign is the highest bit of a nibble: shifted to the top of a byte and back.
    signed = packed.view(torch.int8)
    nibbles = torch.stack([(signed << 4) >> 4, signed >> 4], 1)
    return nibbles.reshape(-1)[: math.prod(shape)].reshape(list(shape))


@unpack_int4.register_fake
def _(packed: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(list(shape), dtype=torch.int8, device=packed.device)


@torch.library.custom_op("hqc::rotate_codes", mutates_args=())
def rotate_codes(codes: Tensor, block: int, regular: bool = False) -> Tensor:
    """w_q·H_block over input channels, H with entries ±1: integers in, integers out, nothing rounded.

    codes int8 [O, C, …] -> int16 [O, C, …];  |result| ≤ 128·block, so a block up to 128 fits int16 with room. A row of
    the regular matrix of order 256 has 120 entries of -1: codes -128…127 give -32 648…32 632 there, which fits too.
    Source: HQ-DM integer path, Q(XH)·H·Wᵀ = Q(XH)·(WH)ᵀ.
    """
    groups = codes.shape[0] * codes.shape[1] // block
    matrix = hadamard_matrix(Rotation(block, regular), torch.float32, str(codes.device))
    # One product [b, b] x [b, everything else]: a batch of small ones takes several times as long.
    rows = codes.reshape(groups, block, -1).transpose(0, 1).reshape(block, -1).to(torch.float32)
    rotated = (matrix @ rows).to(torch.int16)
    return rotated.view(block, groups, -1).transpose(0, 1).contiguous().view(codes.shape)


@rotate_codes.register_fake
def _(codes: Tensor, block: int, regular: bool = False) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.int16, device=codes.device)


@torch.library.custom_op("hqc::digit", mutates_args=())
def digit(codes: Tensor, index: int) -> Tensor:
    """Digit 0 (low, -64…63) or 1 (high) of codes = low + 128·high, as int8.

    high = ⌊(w + 64)/128⌋, low = w - 128·high: exact for -16 448 ≤ w ≤ 16 319, where high fits int8.
    """
    wide = codes.to(torch.int32)
    high = torch.div(wide + DIGIT_BASE // 2, DIGIT_BASE, rounding_mode="floor")
    return (high if index else wide - DIGIT_BASE * high).to(torch.int8)


@digit.register_fake
def _(codes: Tensor, index: int) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.int8, device=codes.device)


@torch.library.custom_op("hqc::half", mutates_args=())
def half(codes: Tensor, index: int) -> Tensor:
    """Half 0, ⌊w/2⌋, or half 1, w - ⌊w/2⌋, of codes in -128…128, as int8 in -64…64; their sum is w."""
    wide = codes.to(torch.int16)
    lower = torch.div(wide, 2, rounding_mode="floor")
    return (wide - lower if index else lower).to(torch.int8)


@half.register_fake
def _(codes: Tensor, index: int) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.int8, device=codes.device)
