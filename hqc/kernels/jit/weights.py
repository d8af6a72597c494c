"""A weight tile for the integer products: int8 as stored, or four-bit codes unpacked and rotated on the way."""

import triton
import triton.language as tl

from hqc.kernels.jit.rotation import butterfly, matrix_tile

__all__ = ["rotation_tile", "weight_tile"]


@triton.jit
def _bytes_of(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 [ROWS, COLUMNS/4] -> int8 [ROWS, COLUMNS], lowest byte first; shifts that compile to no more than moves."""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))


@triton.jit
def _signed_nibbles(words):
    """The low nibble of each of an int32's four bytes, sign-extended within its byte.

    Bit 3 times 0x1E fills bits 4…7 of the same byte and carries nowhere: four codes in three instructions.
    """
    return (words & 0x0F0F0F0F) | ((words & 0x08080808) * 0x1E)


@triton.jit
def rotation_tile(ROTATION: tl.constexpr, REGULAR: tl.constexpr):
    """The ±1 matrix that `weight_tile` multiplies with; order max(32, min(ROTATION, 128)), 64 for a regular H_256."""
    ORDER: tl.constexpr = 64 if REGULAR and ROTATION == 256 else min(max(ROTATION, 32), 128)
    return matrix_tile(min(ROTATION, ORDER), ORDER, REGULAR)


@triton.jit
def weight_tile(
    w_ptr,
    line,
    inside,
    first,
    channels,
    signs,
    FORM: tl.constexpr,
    ROTATION: tl.constexpr,
    REGULAR: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """int8 [TILE_OUTPUTS, TILE_CHANNELS]: weights of `line` (an output channel and tap each) from channel `first` on.

    FORM "int8": w_ptr int8, lines of `channels`.  "nibbles": uint8, two codes a byte, lines of ⌈channels/2⌉ bytes.
    "words": the same bytes read as int32, eight codes each, for channels % 8 == 0: a third of the instructions.
    ROTATION > 1: the tile times H along channels, in integers; the caller has checked that the result fits int8.
    REGULAR: H is the regular one, not Sylvester's.
    EVEN: channels % TILE_CHANNELS == 0, no mask along them.
    """
    if FORM == "int8":
        c = first + tl.arange(0, TILE_CHANNELS)
        mask = inside[:, None] if EVEN else inside[:, None] & (c < channels)[None, :]
        w = tl.load(w_ptr + line[:, None] * channels + c[None, :], mask, other=0)
    elif FORM == "nibbles":
        c = first // 2 + tl.arange(0, TILE_CHANNELS // 2)
        pitch = (channels + 1) // 2
        mask = inside[:, None] & (c < pitch)[None, :]
        packed = tl.load(w_ptr + line[:, None] * pitch + c[None, :], mask, other=0).to(tl.int8, bitcast=True)
        w = tl.reshape(tl.join((packed << 4) >> 4, packed >> 4), (TILE_OUTPUTS, TILE_CHANNELS))
    else:
        c = first // 8 + tl.arange(0, TILE_CHANNELS // 8)
        mask = inside[:, None] if EVEN else inside[:, None] & (c < channels // 8)[None, :]
        words = tl.load(w_ptr + line[:, None] * (channels // 8) + c[None, :], mask, other=0)
        low = _bytes_of(_signed_nibbles(words), TILE_OUTPUTS, TILE_CHANNELS // 2)
        high = _bytes_of(_signed_nibbles(words >> 4), TILE_OUTPUTS, TILE_CHANNELS // 2)
        w = tl.reshape(tl.join(low, high), (TILE_OUTPUTS, TILE_CHANNELS))
    if ROTATION > 1:
        ORDER: tl.constexpr = signs.shape[0]
        groups = tl.reshape(w, (TILE_OUTPUTS * TILE_CHANNELS // ORDER, ORDER))
        rotated = tl.dot(groups, signs, out_dtype=tl.int32)
        if ROTATION > ORDER:
            # H_256 = H_2 ⊗ H_128, or H_4 ⊗ H_64: a 64 KiB matrix would not fit beside the tiles.
            rotated = butterfly(rotated, TILE_OUTPUTS * TILE_CHANNELS, 6 if REGULAR else 7, 8, REGULAR)
        w = tl.reshape(rotated.to(tl.int8), (TILE_OUTPUTS, TILE_CHANNELS))
    return w
