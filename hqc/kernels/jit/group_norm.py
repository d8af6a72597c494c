"""Group norm, SiLU, rotation and quantisation of channels-last images in one pass over memory."""

import triton
import triton.language as tl

from hqc.kernels.jit.codes import inverse_at, sample_codes
from hqc.kernels.jit.gate import activation
from hqc.kernels.jit.rotation import butterfly
from hqc.kernels.jit.statistics import group_affine

__all__ = ["group_norm_affine", "group_norm_quantize"]


@triton.jit
def group_norm_affine(
    statistics_ptr,
    second_statistics_ptr,
    weight_ptr,
    bias_ptr,
    channels,
    first_channels,
    pixels,
    blocks,
    rows,
    second_blocks,
    second_rows,
    affine_ptr,
    EPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """affine [N, 2, channels] = factor and shift of every channel; see `group_affine`.

    For images of many blocks, which each tile of `group_norm_quantize` would else join again.
    Grid: (⌈channels / TILE_CHANNELS⌉, N).
    """
    first = tl.program_id(0) * TILE_CHANNELS
    c = first + tl.arange(0, TILE_CHANNELS)
    sample = tl.program_id(1)
    factor, shift = group_affine(
        statistics_ptr,
        second_statistics_ptr,
        weight_ptr,
        bias_ptr,
        sample,
        c,
        first,
        channels,
        first_channels,
        pixels,
        blocks,
        rows,
        second_blocks,
        second_rows,
        EPS,
        GROUP_CHANNELS,
        GROUPS,
        GROUP_WIDTH,
        BLOCKS,
    )
    at = affine_ptr + sample * 2 * channels + c
    tl.store(at, factor, c < channels)
    tl.store(at + channels, shift, c < channels)


@triton.jit
def group_norm_quantize(
    x_ptr,
    second_ptr,
    statistics_ptr,
    second_statistics_ptr,
    weight_ptr,
    bias_ptr,
    inverse_scale_ptr,
    beside_scale_ptr,
    channels,
    first_channels,
    pixels,
    blocks,
    rows,
    second_blocks,
    second_rows,
    y_ptr,
    codes_ptr,
    beside_ptr,
    EPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    JOINED: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    REGULAR: tl.constexpr,
    BESIDE_NORM: tl.constexpr,
    BESIDE_LOW: tl.constexpr,
    BESIDE_HIGH: tl.constexpr,
    BESIDE_LOG_BLOCK: tl.constexpr,
    BESIDE_REGULAR: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """y = x·factor + shift, SiLU; codes = clip(round((Ĥ·y)·inverse_scale[n])); x, y, codes [N, pixels, channels].

    x is one tensor, or two side by side: [N, pixels, first_channels] and the rest in second.  Either output may be
    left out.  beside: codes of x itself as well, for the shortcut around the norm, with a scale of their own.
    JOINED: statistics is the affine [N, 2, channels] of `group_norm_affine`, else it is joined here.
    Grid: (⌈channels / TILE_CHANNELS⌉, ⌈pixels / TILE_ROWS⌉, N).
    """
    first = tl.program_id(0) * TILE_CHANNELS
    c = first + tl.arange(0, TILE_CHANNELS)
    p = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    sample = tl.program_id(2)
    there = c < channels
    mask = (p < pixels)[:, None] & there[None, :]
    row = sample * pixels + p
    if second_ptr is None:
        x = tl.load(x_ptr + row[:, None] * channels + c[None, :], mask, other=0.0).to(tl.float32)
    else:
        mine = (c < first_channels)[None, :]
        x = tl.load(x_ptr + row[:, None] * first_channels + c[None, :], mask & mine, other=0.0)
        at = row[:, None] * (channels - first_channels) + (c - first_channels)[None, :]
        other = tl.load(second_ptr + at, mask & (c >= first_channels)[None, :], other=0.0)
        x = tl.where(mine, x, other).to(tl.float32)
    if beside_ptr is not None:
        z = butterfly(x, TILE_ROWS * TILE_CHANNELS, 0, BESIDE_LOG_BLOCK, BESIDE_REGULAR)
        z *= tl.load(inverse_at(beside_scale_ptr, sample, BESIDE_LOW)) * BESIDE_NORM
        beside = sample_codes(z, beside_scale_ptr, sample, BESIDE_LOW, BESIDE_HIGH)
        tl.store(beside_ptr + row[:, None] * channels + c[None, :], beside.to(tl.int8), mask)
    if JOINED:
        at = statistics_ptr + sample * 2 * channels + c
        factor = tl.load(at, there, other=0.0)
        shift = tl.load(at + channels, there, other=0.0)
    else:
        factor, shift = group_affine(
            statistics_ptr,
            second_statistics_ptr,
            weight_ptr,
            bias_ptr,
            sample,
            c,
            first,
            channels,
            first_channels,
            pixels,
            blocks,
            rows,
            second_blocks,
            second_rows,
            EPS,
            GROUP_CHANNELS,
            GROUPS,
            GROUP_WIDTH,
            BLOCKS,
        )
    y = tl.fma(x, tl.broadcast_to(factor[None, :], x.shape), tl.broadcast_to(shift[None, :], x.shape))
    if SILU:
        y = activation(y, "silu")
    if y_ptr is not None:
        tl.store(y_ptr + row[:, None] * channels + c[None, :], y.to(y_ptr.dtype.element_ty), mask)
    if codes_ptr is not None:
        # Channels past the last are blocks of their own, and are not written.
        y = butterfly(y, TILE_ROWS * TILE_CHANNELS, 0, LOG_BLOCK, REGULAR)
        y *= tl.load(inverse_at(inverse_scale_ptr, sample, LOW)) * NORM
        codes = sample_codes(y, inverse_scale_ptr, sample, LOW, HIGH)
        tl.store(codes_ptr + row[:, None] * channels + c[None, :], codes.to(tl.int8), mask)
