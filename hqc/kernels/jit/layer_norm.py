"""Layer norm, rotation and quantisation of rows in one pass over memory."""

import triton
import triton.language as tl

from hqc.kernels.jit.codes import inverse_at, row_codes
from hqc.kernels.jit.rotation import butterfly

__all__ = ["layer_norm_quantize"]


@triton.jit
def layer_norm_quantize(
    x_ptr,
    weight_ptr,
    bias_ptr,
    inverse_scale_ptr,
    rows,
    channels,
    rows_per_sample,
    y_ptr,
    codes_ptr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    REGULAR: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """y = (x - mean)/√(variance + EPS)·weight + bias; codes = clip(round((Ĥ·y)·inverse_scale[m // rows_per_sample])).

    x, y, codes [rows, channels], weight and bias fp32 [channels]; y is left out where nobody else reads it.
    Grid: (⌈rows / TILE_ROWS⌉,).  TILE_CHANNELS holds a whole row.
    """
    m = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    c = tl.arange(0, TILE_CHANNELS)
    there = c < channels
    mask = (m < rows)[:, None] & there[None, :]
    at = m[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / channels
    away = tl.where(mask, x - mean[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(away * away, 1) / channels + EPS)
    y = away * factor[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, there, other=0.0)
        bias = tl.load(bias_ptr + c, there, other=0.0)
        y = y * weight[None, :] + bias[None, :]
    if y_ptr is not None:
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)
    sample = m // rows_per_sample
    inverse = tl.load(inverse_at(inverse_scale_ptr, sample, LOW), m < rows, other=0.0)
    y = butterfly(y, TILE_ROWS * TILE_CHANNELS, 0, LOG_BLOCK, REGULAR)
    codes = row_codes(y * (inverse * NORM)[:, None], inverse_scale_ptr, sample, m < rows, LOW, HIGH)
    tl.store(codes_ptr + at, codes.to(tl.int8), mask)
