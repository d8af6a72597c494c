"""Convolution of NHWC codes as an implicit matrix product: taps and channels are the inner axis, nothing is copied."""

import triton
import triton.language as tl

from hqc.kernels.jit.epilogue import tile_of, write_outputs, write_sums
from hqc.kernels.jit.weights import rotation_tile, weight_tile

__all__ = ["int_conv2d"]


@triton.jit
def int_conv2d(
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
    height,
    width,
    channels,
    outputs,
    out_height,
    out_width,
    y_ptr,
    statistics_ptr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    UPSAMPLE: tl.constexpr,
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
    """As `int_gemm` with rows = N·out_height·out_width pixels and KERNEL_H·KERNEL_W taps of `channels` each.

    codes int8 [N, height, width, channels], weights [outputs, KERNEL_H, KERNEL_W, channels] in the FORM, y
    [N, out_height, out_width, outputs], or partial sums with SPLITS > 1.  Pixels outside the image are code 0, which
    is real 0: codes are symmetric.  UPSAMPLE: the image that is convolved has every pixel of the codes that many times
    along each axis, and is never written.
    """
    down, across = tile_of(rows, outputs, TILE_ROWS, TILE_OUTPUTS, GROUP)
    m = down * TILE_ROWS + tl.arange(0, TILE_ROWS)
    o = across * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    sample = m // (out_height * out_width)
    pixel = m % (out_height * out_width)
    top = pixel // out_width * STRIDE_H - PAD_H
    left = pixel % out_width * STRIDE_W - PAD_W
    acc = tl.zeros((TILE_ROWS, TILE_OUTPUTS), tl.int32)
    acc_high = acc
    signs = rotation_tile(ROTATION, REGULAR_ROTATION) if ROTATION > 1 else None
    chunks = tl.cdiv(channels, TILE_CHANNELS)
    # One loop over taps and channels, not two: the compiler pipelines the loads of the innermost loop only.
    steps = KERNEL_H * KERNEL_W * chunks
    if SPLITS == 1:
        begin, end, tap, first = 0, steps, 0, 0
    else:
        share = tl.cdiv(steps, SPLITS)
        begin = tl.program_id(1) * share
        end = tl.minimum(begin + share, steps)
        tap, first = begin // chunks, begin % chunks * TILE_CHANNELS
    for _ in range(begin, end):
        y = top + tap // KERNEL_W * DILATION_H
        x = left + tap % KERNEL_W * DILATION_W
        inside = (m < rows) & (y >= 0) & (y < height * UPSAMPLE) & (x >= 0) & (x < width * UPSAMPLE)
        c = first + tl.arange(0, TILE_CHANNELS)
        mask = inside[:, None] if EVEN else inside[:, None] & (c < channels)[None, :]
        offsets = ((sample * height + y // UPSAMPLE) * width + x // UPSAMPLE)[:, None] * channels + c[None, :]
        codes = tl.load(codes_ptr + offsets, mask, other=0)
        line = o * (KERNEL_H * KERNEL_W) + tap
        w = weight_tile(
            weight_ptr,
            line,
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
                line,
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
        first += TILE_CHANNELS
        last = first >= channels
        tap += last.to(tl.int32)
        first = tl.where(last, 0, first)
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
            out_height * out_width,
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
