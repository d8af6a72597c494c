"""Rotation, scaling, rounding and clipping in one pass over memory; rows of channels, or NCHW into NHWC."""

import triton
import triton.language as tl

from hqc.kernels.jit.codes import inverse_at, nibbles, row_codes, sample_codes
from hqc.kernels.jit.rotation import butterfly

__all__ = ["hadamard_quantize_nchw", "hadamard_quantize_rows"]


@triton.jit
def hadamard_quantize_rows(
    x_ptr,
    second_ptr,
    inverse_scale_ptr,
    rows,
    channels,
    rows_per_sample,
    codes_ptr,
    NORM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    REGULAR: tl.constexpr,
    PACKED: tl.constexpr,
    PITCH: tl.constexpr,
    FIRST: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """q[m, c] = clip(round((Ĥ·x)[m, c]·inverse_scale[m // rows_per_sample])); x, q [rows, channels].

    LOW, HIGH: the bounds, or None where inverse_scale is [N, 3] and has them beside each scale, as in every kernel.
    PITCH: numbers between the starts of x's rows, 0 where they lie close.  second: x is two tensors side by side, of
    FIRST channels and the rest.
    Grid: (⌈rows / TILE_ROWS⌉, ⌈channels / TILE_CHANNELS⌉).  A tile holds whole blocks, so nothing crosses programs.
    """
    m = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    first = tl.program_id(1) * TILE_CHANNELS
    c = first + tl.arange(0, TILE_CHANNELS)
    inside = m < rows
    mask = inside[:, None] & (c < channels)[None, :]
    if second_ptr is not None:
        mine = (c < FIRST)[None, :]
        x = tl.load(x_ptr + m[:, None] * FIRST + c[None, :], mask & mine, other=0.0)
        at = m[:, None] * (channels - FIRST) + (c - FIRST)[None, :]
        x = tl.where(mine, x, tl.load(second_ptr + at, mask & (c >= FIRST)[None, :], other=0.0))
    else:
        pitch = PITCH if PITCH > 0 else channels
        x = tl.load(x_ptr + m[:, None] * pitch + c[None, :], mask, other=0.0)
    inverse = tl.load(inverse_at(inverse_scale_ptr, m // rows_per_sample, LOW), inside, other=0.0)
    y = butterfly(x.to(tl.float32), TILE_ROWS * TILE_CHANNELS, 0, LOG_BLOCK, REGULAR)
    # The factor 1/√b comes after the sum and before the scale, as in the reference: both sides round alike.
    codes = row_codes(y * NORM * inverse[:, None], inverse_scale_ptr, m // rows_per_sample, inside, LOW, HIGH)
    if PACKED:
        half = first // 2 + tl.arange(0, TILE_CHANNELS // 2)
        mask = inside[:, None] & (half < channels // 2)[None, :]
        packed = nibbles(codes, (TILE_ROWS, TILE_CHANNELS // 2))
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
    REGULAR: tl.constexpr,
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
    inverse = tl.load(inverse_at(inverse_scale_ptr, sample, LOW))
    offsets = (sample * channels + c[:, None]) * pixels + p[None, :]
    x = tl.load(x_ptr + offsets, (c < channels)[:, None] & (p < pixels)[None, :], other=0.0)
    # Channels are the slow axis of the tile: their bits stand above the pixels' in the flat index.
    y = butterfly(x.to(tl.float32), TILE_ROWS * TILE_CHANNELS, LOG_TILE_ROWS, LOG_TILE_ROWS + LOG_BLOCK, REGULAR)
    codes = sample_codes(y * NORM * inverse, inverse_scale_ptr, sample, LOW, HIGH)
    row = sample * pixels + p
    if PACKED:
        half = first // 2 + tl.arange(0, TILE_CHANNELS // 2)
        pairs = tl.permute(tl.reshape(codes, (TILE_CHANNELS // 2, 2, TILE_ROWS)), (2, 0, 1))
        packed = nibbles(pairs, (TILE_ROWS, TILE_CHANNELS // 2))
        mask = (p < pixels)[:, None] & (half < channels // 2)[None, :]
        tl.store(codes_ptr + row[:, None] * (channels // 2) + half[None, :], packed, mask)
    else:
        mask = (p < pixels)[:, None] & (c < channels)[None, :]
        tl.store(codes_ptr + row[:, None] * channels + c[None, :], tl.trans(codes.to(tl.int8)), mask)
