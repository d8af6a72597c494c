"""Mean and squared deviations of channels over blocks of rows, and what a group norm makes of them.

No atomics: every block writes its own numbers, and they are joined in one order, so that every run gives the same bits.
A block's deviations are from its own mean, and blocks are joined by Chan's formula (Chan, Golub, LeVeque 1983): sums of
squares less the squared mean would lose the digits of a channel whose mean is large.
"""

import triton
import triton.language as tl

__all__ = ["column_statistics", "group_affine", "store_statistics"]


@triton.jit
def store_statistics(y, inside, count, statistics_ptr, block, c, channels):
    """statistics[block, 0, c] = mean, [block, 1, c] = Σ (y - mean)² over the `count` rows `inside` of y [R, C]."""
    mean = tl.sum(tl.where(inside[:, None], y, 0.0), 0) / count
    away = tl.where(inside[:, None], y - mean[None, :], 0.0)
    at = statistics_ptr + block * 2 * channels + c
    tl.store(at, mean, c < channels)
    tl.store(at + channels, tl.sum(away * away, 0), c < channels)


@triton.jit
def column_statistics(
    x_ptr,
    channels,
    pixels,
    statistics_ptr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """x [N, pixels, channels] -> fp32 [N, ⌈pixels / TILE_ROWS⌉, 2, channels]: mean and squared deviations of a block.

    Grid: (⌈channels / TILE_CHANNELS⌉, ⌈pixels / TILE_ROWS⌉, N).
    """
    c = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    p = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    sample = tl.program_id(2)
    inside = p < pixels
    mask = inside[:, None] & (c < channels)[None, :]
    x = tl.load(x_ptr + (sample * pixels + p)[:, None] * channels + c[None, :], mask, other=0.0).to(tl.float32)
    count = tl.minimum(TILE_ROWS, pixels - tl.program_id(1) * TILE_ROWS).to(tl.float32)
    block = sample * tl.cdiv(pixels, TILE_ROWS) + tl.program_id(1)
    store_statistics(x, inside, count, statistics_ptr, block, c, channels)


@triton.jit
def _group_blocks(
    statistics_ptr,
    sample,
    first,
    blocks,
    rows,
    pixels,
    channels,
    channel,
    wanted,
    BLOCKS: tl.constexpr,
):
    """(mean, Σ deviations², rows) [BLOCKS, …] of the given channels in the blocks from `first` on; 0 outside."""
    b = first + tl.arange(0, BLOCKS)
    mask = (b < blocks)[:, None] & wanted[None, :]
    at = statistics_ptr + ((sample * blocks + b) * 2)[:, None] * channels + channel[None, :]
    count = tl.minimum(rows, pixels - b * rows).to(tl.float32)
    mean = tl.load(at, mask, other=0.0)
    away = tl.load(at + channels, mask, other=0.0)
    return mean, away, tl.where(mask, count[:, None], 0.0)


@triton.jit
def group_affine(
    statistics_ptr,
    second_ptr,
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
    EPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """(factor, shift) of the channels c of one sample: y = x·factor + shift is the group norm of x.

    factor = weight / √(variance + EPS), shift = bias - mean·factor.

    statistics fp32 [N, blocks, 2, first_channels], each block of `rows` pixels, the last of fewer; second likewise for
    the channels after `first_channels`, where x is two tensors side by side.  c = first … first + TILE - 1.
    GROUPS: groups that a tile may touch, GROUP_WIDTH: channels of a group; both rounded up to powers of two.
    """
    g = first // GROUP_CHANNELS + tl.arange(0, GROUPS)
    j = tl.arange(0, GROUP_WIDTH)
    channel = tl.reshape(g[:, None] * GROUP_CHANNELS + j[None, :], (GROUPS * GROUP_WIDTH,))
    wanted = tl.reshape((g * 0)[:, None] + (j < GROUP_CHANNELS)[None, :].to(tl.int32), (GROUPS * GROUP_WIDTH,)) > 0
    wanted = wanted & (channel < channels)
    own = wanted & (channel < first_channels)
    total = tl.zeros((GROUPS * GROUP_WIDTH,), tl.float32)
    for b in range(0, blocks, BLOCKS):
        mean, _, count = _group_blocks(
            statistics_ptr, sample, b, blocks, rows, pixels, first_channels, channel, own, BLOCKS
        )
        total += tl.sum(mean * count, 0)
    if second_ptr is not None:
        other = wanted & (channel >= first_channels)
        rest = channels - first_channels
        for b in range(0, second_blocks, BLOCKS):
            mean, _, count = _group_blocks(
                second_ptr, sample, b, second_blocks, second_rows, pixels, rest, channel - first_channels, other, BLOCKS
            )
            total += tl.sum(mean * count, 0)
    elements = pixels * GROUP_CHANNELS * 1.0
    group_mean = tl.sum(tl.reshape(total, (GROUPS, GROUP_WIDTH)), 1) / elements
    mean_of = tl.reshape(group_mean[:, None] + (j * 0).to(tl.float32)[None, :], (GROUPS * GROUP_WIDTH,))
    total = tl.zeros((GROUPS * GROUP_WIDTH,), tl.float32)
    for b in range(0, blocks, BLOCKS):
        mean, away, count = _group_blocks(
            statistics_ptr, sample, b, blocks, rows, pixels, first_channels, channel, own, BLOCKS
        )
        off = mean - mean_of[None, :]
        total += tl.sum(away + count * off * off, 0)
    if second_ptr is not None:
        for b in range(0, second_blocks, BLOCKS):
            mean, away, count = _group_blocks(
                second_ptr, sample, b, second_blocks, second_rows, pixels, rest, channel - first_channels, other, BLOCKS
            )
            off = mean - mean_of[None, :]
            total += tl.sum(away + count * off * off, 0)
    variance = tl.sum(tl.reshape(total, (GROUPS, GROUP_WIDTH)), 1) / elements
    factor = 1.0 / tl.sqrt(variance + EPS)
    # From groups to the tile's channels: each takes the number of the one group that it is in.
    mine = (c // GROUP_CHANNELS)[:, None] == g[None, :]
    mean_c = tl.sum(tl.where(mine, group_mean[None, :], 0.0), 1)
    factor_c = tl.sum(tl.where(mine, factor[None, :], 0.0), 1)
    there = c < channels
    if weight_ptr is not None:
        factor_c *= tl.load(weight_ptr + c, there, other=0.0)
        shift = tl.load(bias_ptr + c, there, other=0.0) - mean_c * factor_c
    else:
        shift = -mean_c * factor_c
    return factor_c, shift
