"""Attention of wide heads in two products: scores with their softmax begun, values with it ended; codes on request.

Flash kernels keep a row of the output, as wide as a head, in registers; heads wider than 256 do not fit. So the scores
are written once, as exp2(s - the tile's own maximum) in half precision, with that maximum and the sum: what a tile
lacks to the softmax is one factor a row, which the second product applies to its tiles as it reads them.
"""

import triton
import triton.language as tl

from hqc.kernels.jit.codes import inverse_at, sample_codes
from hqc.kernels.jit.rotation import butterfly

__all__ = ["attention_scores", "attention_values"]


@triton.jit
def attention_scores(
    q_ptr,
    k_ptr,
    tokens,
    keys,
    p_ptr,
    maxima_ptr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    Q_PITCH: tl.constexpr,
    K_PITCH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """p[t, s] = exp2(SCALE·Σ_c q[t, c]·k[s, c] - m[t]), m the maximum of a tile's row; p [N·HEADS, tokens, keys] half.

    q, k [N, tokens or keys, PITCH] with HEADS·WIDTH numbers of a row in use.  SCALE holds log2 e.
    maxima fp32 [N·HEADS, ⌈keys / TILE_KEYS⌉, 2, tokens]: m, and the sum of p over the tile's row.
    Grid: (⌈keys / TILE_KEYS⌉, ⌈tokens / TILE_ROWS⌉, N·HEADS).
    """
    t = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    s = tl.program_id(0) * TILE_KEYS + tl.arange(0, TILE_KEYS)
    head = tl.program_id(2)
    sample, column = head // HEADS, head % HEADS * WIDTH
    in_rows, in_keys = t < tokens, s < keys
    acc = tl.zeros((TILE_ROWS, TILE_KEYS), tl.float32)
    for first in range(0, WIDTH, TILE_CHANNELS):
        c = first + tl.arange(0, TILE_CHANNELS)
        there = c < WIDTH
        q = tl.load(
            q_ptr + (sample * tokens + t)[:, None] * Q_PITCH + (column + c)[None, :],
            in_rows[:, None] & there[None, :],
            other=0.0,
        )
        k = tl.load(
            k_ptr + (sample * keys + s)[:, None] * K_PITCH + (column + c)[None, :],
            in_keys[:, None] & there[None, :],
            other=0.0,
        )
        acc = tl.dot(q, tl.trans(k), acc)
    scores = tl.where(in_keys[None, :], acc * SCALE, float("-inf"))
    largest = tl.max(scores, 1)
    p = tl.exp2(scores - largest[:, None]).to(p_ptr.dtype.element_ty)
    mask = in_rows[:, None] & in_keys[None, :]
    tl.store(p_ptr + (head * tokens + t)[:, None] * keys + s[None, :], p, mask)
    at = maxima_ptr + (head * tl.num_programs(0) + tl.program_id(0)) * 2 * tokens + t
    tl.store(at, largest, in_rows)
    tl.store(at + tokens, tl.sum(p.to(tl.float32), 1), in_rows)


@triton.jit
def attention_values(
    p_ptr,
    v_ptr,
    maxima_ptr,
    inverse_scale_ptr,
    tokens,
    keys,
    y_ptr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    V_PITCH: tl.constexpr,
    PARTS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    NORM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    REGULAR: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """y[t, c] = Σ_s p[t, s]·f(t, s)·v[s, c], f what each of the PARTS tiles of keys lacks to the softmax; see above.

    v [N, keys, V_PITCH]; y [N, tokens, HEADS·WIDTH] in v's type, or its codes, int8, if inverse_scale is given.
    TILE_KEYS is that of `attention_scores`; MOST_PARTS is PARTS rounded up to a power of two.
    Grid: (⌈WIDTH / TILE_CHANNELS⌉, ⌈tokens / TILE_ROWS⌉, N·HEADS).
    """
    t = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    c = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    head = tl.program_id(2)
    sample, column = head // HEADS, head % HEADS * WIDTH
    in_rows, there = t < tokens, c < WIDTH
    part = tl.arange(0, MOST_PARTS)
    mask = (part < PARTS)[:, None] & in_rows[None, :]
    at = maxima_ptr + ((head * PARTS + part) * 2)[:, None] * tokens + t[None, :]
    maxima = tl.load(at, mask, other=float("-inf"))
    largest = tl.where(in_rows, tl.max(maxima, 0), 0.0)
    total = tl.sum(tl.load(at + tokens, mask, other=0.0) * tl.exp2(maxima - largest[None, :]), 0)
    share = 1.0 / tl.where(in_rows, total, 1.0)
    acc = tl.zeros((TILE_ROWS, TILE_CHANNELS), tl.float32)
    for index in range(PARTS):
        s = index * TILE_KEYS + tl.arange(0, TILE_KEYS)
        in_keys = s < keys
        p = tl.load(
            p_ptr + (head * tokens + t)[:, None] * keys + s[None, :], in_rows[:, None] & in_keys[None, :], other=0.0
        )
        v = tl.load(
            v_ptr + (sample * keys + s)[:, None] * V_PITCH + (column + c)[None, :],
            in_keys[:, None] & there[None, :],
            other=0.0,
        )
        own = tl.load(maxima_ptr + (head * PARTS + index) * 2 * tokens + t, in_rows, other=0.0)
        factor = tl.exp2(own - largest) * share
        acc = tl.dot((p.to(tl.float32) * factor[:, None]).to(v.dtype), v, acc)
    at = y_ptr + (sample * tokens + t)[:, None] * (HEADS * WIDTH) + (column + c)[None, :]
    mask = in_rows[:, None] & there[None, :]
    if inverse_scale_ptr is not None:
        y = butterfly(acc, TILE_ROWS * TILE_CHANNELS, 0, LOG_BLOCK, REGULAR)
        y *= tl.load(inverse_at(inverse_scale_ptr, sample, LOW)) * NORM
        codes = sample_codes(y, inverse_scale_ptr, sample, LOW, HIGH)
        tl.store(at, codes.to(tl.int8), mask)
    else:
        tl.store(at, acc.to(y_ptr.dtype.element_ty), mask)
