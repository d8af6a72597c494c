"""Rotation, scaling, rounding and clipping in one pass over memory; rows of channels, or NCHW into NHWC."""

import triton
import triton.language as tl

from hqc.kernels.jit.rotation import butterfly

__all__ = ["hadamard_quantize_nchw", "hadamard_quantize_rows"]


@triton.jit
def _codes(levels, LOW: tl.constexpr, HIGH: tl.constexpr):
    """clip(round half to even) of float32 levels; int32 whose lowest byte is the code.

    1.5·2^23 + q has q's two's complement in its lowest bits, rounded half to even by the addition itself: no
    conversion instruction (a quarter of the rate of an addition) and no libdevice.  Clipping first is the same as
    clipping last, because the bounds are integers.
    """
    levels = tl.minimum(tl.maximum(levels, LOW * 1.0), HIGH * 1.0)
    return (levels + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _nibbles(codes, SHAPE: tl.constexpr):
    """Two codes a byte, the first in the low nibble: int32 [R, 2·K] -> uint8 SHAPE = (R, K)."""
    low, high = tl.split(tl.reshape(codes, (SHAPE[0], SHAPE[1], 2)))
    return ((low & 15) | ((high & 15) << 4)).to(tl.uint8)


@triton.jit
def hadamard_quantize_rows(
    x_ptr,
    inverse_scale_ptr,
    rows,
    channels,
    rows_per_sample,
    codes_ptr,
    NORM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """q[m, c] = clip(round((Ĥ·x)[m, c]·inverse_scale[m // rows_per_sample])); x, q [rows, channels].

    Grid: (⌈rows / TILE_ROWS⌉, ⌈channels / TILE_CHANNELS⌉).  A tile holds whole blocks, so nothing crosses programs.
    """
    m = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    first = tl.program_id(1) * TILE_CHANNELS
    c = first + tl.arange(0, TILE_CHANNELS)
    inside = m < rows
    x = tl.load(x_ptr + m[:, None] * channels + c[None, :], inside[:, None] & (c < channels)[None, :], other=0.0)
    inverse = tl.load(inverse_scale_ptr + m // rows_per_sample, inside, other=0.0)
    y = butterfly(x.to(tl.float32), TILE_ROWS * TILE_CHANNELS, 0, LOG_BLOCK)
    # The factor 1/√b comes after the sum and before the scale, as in the reference: both sides round alike.
    codes = _codes(y * NORM * inverse[:, None], LOW, HIGH)
    if PACKED:
        half = first // 2 + tl.arange(0, TILE_CHANNELS // 2)
        mask = inside[:, None] & (half < channels // 2)[None, :]
        packed = _nibbles(codes, (TILE_ROWS, TILE_CHANNELS // 2))
        tl.store(codes_ptr + m[:, None] * (channels // 2) + half[None, :], packed, mask)
    else:
        mask = inside[:, None] & (c < channels)[None, :]
        tl.store(codes_ptr + m[:, None] * channels + c[None, :], codes.to(tl.int8), mask)


@triton.jit
def hadamard_quantize_nchw(
    x_ptr,
    inverse_scale_ptr,
    channels,
    pixels,
    codes_ptr,
    NORM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    LOG_TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """x [N, channels, pixels] -> q [N, pixels, channels]: the same, transposed on the way.

    Grid: (⌈channels / TILE_CHANNELS⌉, ⌈pixels / TILE_ROWS⌉, N); channels run fastest, so that the pieces of an output
    line are written close to each other in time.  TILE_ROWS counts pixels.
    """
    first = tl.program_id(0) * TILE_CHANNELS
    c = first + tl.arange(0, TILE_CHANNELS)
    p = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    sample = tl.program_id(2)
    inverse = tl.load(inverse_scale_ptr + sample)
    offsets = (sample * channels + c[:, None]) * pixels + p[None, :]
    x = tl.load(x_ptr + offsets, (c < channels)[:, None] & (p < pixels)[None, :], other=0.0)
    # Channels are the slow axis of the tile: their bits stand above the pixels' in the flat index.
    y = butterfly(x.to(tl.float32), TILE_ROWS * TILE_CHANNELS, LOG_TILE_ROWS, LOG_TILE_ROWS + LOG_BLOCK)
    codes = _codes(y * NORM * inverse, LOW, HIGH)
    row = sample * pixels + p
    if PACKED:
        half = first // 2 + tl.arange(0, TILE_CHANNELS // 2)
        pairs = tl.permute(tl.reshape(codes, (TILE_CHANNELS // 2, 2, TILE_ROWS)), (2, 0, 1))
        packed = _nibbles(pairs, (TILE_ROWS, TILE_CHANNELS // 2))
        mask = (p < pixels)[:, None] & (half < channels // 2)[None, :]
        tl.store(codes_ptr + row[:, None] * (channels // 2) + half[None, :], packed, mask)
    else:
        mask = (p < pixels)[:, None] & (c < channels)[None, :]
        tl.store(codes_ptr + row[:, None] * channels + c[None, :], tl.trans(codes.to(tl.int8)), mask)
