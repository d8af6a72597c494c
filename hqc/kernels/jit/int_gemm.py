"""int8 codes times int8 or packed four-bit weights, with the rescaling in the epilogue."""

import triton
import triton.language as tl

from hqc.kernels.jit.epilogue import tile_of, write_outputs, write_sums
from hqc.kernels.jit.weights import rotation_tile, weight_tile

__all__ = ["int_gemm"]


@triton.jit
def int_gemm(
    codes_ptr,
    weight_ptr,
    weight_high_ptr,
    weight_scale_ptr,
    scale_ptr,
    bias_ptr,
    shift_ptr,
    residual_ptr,
    inverse_scale_ptr,
    rows,
    channels,
    outputs,
    rows_per_sample,
    y_ptr,
    statistics_ptr,
    FORM: tl.constexpr,
    ROTATION: tl.constexpr,
    REGULAR_ROTATION: tl.constexpr,
    HIGH_FACTOR: tl.constexpr,
    SHIFT_PITCH: tl.constexpr,
    WHOLE: tl.constexpr,
    SILU: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    REGULAR: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """acc[m, o] = Σ_c codes[m, c]·(w[o, c] + HIGH_FACTOR·w_high[o, c]); y (codes, statistics) from acc as
    `write_outputs` says.

    codes int8 [rows, channels], w in the FORM of `weight_tile`, y [rows, outputs].
    Grid: (⌈rows / TILE_ROWS⌉·⌈outputs / TILE_OUTPUTS⌉, SPLITS).  With SPLITS > 1 each program sums a part of the
    channels, and y is int32 [SPLITS, rows, outputs] for `sum_splits`.
    """
    down, across = tile_of(rows, outputs, TILE_ROWS, TILE_OUTPUTS, GROUP)
    m = down * TILE_ROWS + tl.arange(0, TILE_ROWS)
    o = across * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    acc = tl.zeros((TILE_ROWS, TILE_OUTPUTS), tl.int32)
    acc_high = acc
    signs = rotation_tile(ROTATION, REGULAR_ROTATION) if ROTATION > 1 else None
    if SPLITS == 1:
        begin, end = 0, channels
    else:
        share = tl.cdiv(tl.cdiv(channels, TILE_CHANNELS), SPLITS) * TILE_CHANNELS
        begin = tl.program_id(1) * share
        end = tl.minimum(begin + share, channels)
    for first in range(begin, end, TILE_CHANNELS):
        c = first + tl.arange(0, TILE_CHANNELS)
        mask = (m < rows)[:, None] if EVEN else (m < rows)[:, None] & (c < channels)[None, :]
        codes = tl.load(codes_ptr + m[:, None] * channels + c[None, :], mask, other=0)
        w = weight_tile(
            weight_ptr,
            o,
            o < outputs,
            first,
            channels,
            signs,
            FORM,
            ROTATION,
            REGULAR_ROTATION,
            EVEN,
            TILE_OUTPUTS,
            TILE_CHANNELS,
        )
        acc = tl.dot(codes, tl.trans(w), acc, out_dtype=tl.int32)
        if weight_high_ptr is not None:
            w = weight_tile(
                weight_high_ptr,
                o,
                o < outputs,
                first,
                channels,
                None,
                "int8",
                1,
                False,
                EVEN,
                TILE_OUTPUTS,
                TILE_CHANNELS,
            )
            acc_high = tl.dot(codes, tl.trans(w), acc_high, out_dtype=tl.int32)
    if weight_high_ptr is not None:
        acc += HIGH_FACTOR * acc_high
    if SPLITS == 1:
        write_outputs(
            acc,
            weight_scale_ptr,
            scale_ptr,
            bias_ptr,
            shift_ptr,
            residual_ptr,
            inverse_scale_ptr,
            y_ptr,
            statistics_ptr,
            m,
            across * TILE_OUTPUTS,
            rows,
            outputs,
            rows_per_sample,
            down,
            SHIFT_PITCH,
            WHOLE,
            SILU,
            GATE,
            NORM,
            LOW,
            HIGH,
            LOG_BLOCK,
            REGULAR,
            TILE_ROWS,
            TILE_OUTPUTS,
        )
    else:
        write_sums(acc, y_ptr, tl.program_id(1), m, o, rows, outputs)
