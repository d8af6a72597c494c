"""Activations and gates of feed-forward layers, and their quantisation in one pass over memory."""

import triton
import triton.language as tl

from hqc.kernels.jit.codes import to_codes
from hqc.kernels.jit.rotation import butterfly

__all__ = ["activation", "gate_quantize"]


@triton.jit
def activation(x, KIND: tl.constexpr):
    """x in float32: "silu", "gelu" (by erf), "gelu_tanh", or "none"."""
    if KIND == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # tanh(u) = 1 - 2/(1 + e^(2u)), so that no library is needed.
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = 0.5 * x * (2.0 - 2.0 / (1.0 + tl.exp(2.0 * u)))
    return x


@triton.jit
def gate_quantize(
    x_ptr,
    inverse_scale_ptr,
    rows,
    channels,
    rows_per_sample,
    codes_ptr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """y = x[:, :channels]·f(x[:, channels:]) if GATED, else f(x); codes = clip(round((Ĥ·y)·inverse_scale[n])).

    x [rows, 2·channels] or [rows, channels], codes [rows, channels].
    Grid: (⌈rows / TILE_ROWS⌉, ⌈channels / TILE_CHANNELS⌉).
    """
    m = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    c = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    mask = (m < rows)[:, None] & (c < channels)[None, :]
    if GATED:
        at = x_ptr + m[:, None] * (2 * channels) + c[None, :]
        gate = tl.load(at + channels, mask, other=0.0).to(tl.float32)
        y = tl.load(at, mask, other=0.0).to(tl.float32) * activation(gate, KIND)
    else:
        y = activation(tl.load(x_ptr + m[:, None] * channels + c[None, :], mask, other=0.0).to(tl.float32), KIND)
    inverse = tl.load(inverse_scale_ptr + m // rows_per_sample, m < rows, other=0.0)
    y = butterfly(y, TILE_ROWS * TILE_CHANNELS, 0, LOG_BLOCK)
    codes = to_codes(y * NORM * inverse[:, None], LOW, HIGH)
    tl.store(codes_ptr + m[:, None] * channels + c[None, :], codes.to(tl.int8), mask)
