"""Activations and gates of feed-forward layers, and their quantisation in one pass over memory."""

import triton
import triton.language as tl
from triton import knobs

from hqc.kernels.jit.codes import inverse_at, row_codes
from hqc.kernels.jit.rotation import butterfly

__all__ = ["activation", "exponential", "gate_quantize", "reciprocal"]

_COMPILED = tl.constexpr(not knobs.runtime.interpret)


@triton.jit
def exponential(x):
    """e^x of float32 within two last bits, results below 2^-126 as 0: one multiplication and one special instruction.

    Without ftz the compiler wraps the instruction in three more, for results that small.
    """
    x = x * 1.4426950408889634
    if _COMPILED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """1/x of float32 within a last bit, for 1 ≤ x: a division takes five instructions more."""
    if _COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def activation(x, KIND: tl.constexpr):
    """x in float32: "silu", "gelu" (by erf), "gelu_tanh", or "none"."""
    if KIND == "silu":
        x = x * reciprocal(1.0 + exponential(-x))
    elif KIND == "gelu":
        # erf by 7.1.26 of Abramowitz and Stegun, within 1.5e-7: half the instructions of the library's.
        z = tl.abs(x) * 0.7071067811865476
        t = reciprocal(1.0 + 0.3275911 * z)
        tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
        tail *= exponential(-z * z)
        x = 0.5 * x * tl.where(x >= 0, 2.0 - tail, tail)
    elif KIND == "gelu_tanh":
        # tanh(u) = 1 - 2/(1 + e^(2u)), so that no library is needed.
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * (1.0 - reciprocal(1.0 + exponential(2.0 * u)))
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
    REGULAR: tl.constexpr,
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
    sample = m // rows_per_sample
    inverse = tl.load(inverse_at(inverse_scale_ptr, sample, LOW), m < rows, other=0.0)
    y = butterfly(y, TILE_ROWS * TILE_CHANNELS, 0, LOG_BLOCK, REGULAR)
    codes = row_codes(y * (inverse * NORM)[:, None], inverse_scale_ptr, sample, m < rows, LOW, HIGH)
    tl.store(codes_ptr + m[:, None] * channels + c[None, :], codes.to(tl.int8), mask)
