"""Hadamard's matrix inside a kernel: as a butterfly over a tile, and as a ±1 tile for an integer product."""

import triton
import triton.language as tl

__all__ = ["butterfly", "matrix_tile"]


@triton.jit
def butterfly(x, SIZE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, REGULAR: tl.constexpr):
    """H·x, unnormalised, along bits FIRST…LAST-1 of the flat index of x [SIZE elements], any shape.

    Sylvester's: one addition and one subtraction a bit; bit i pairs elements 2^i apart, (a, b) -> (a + b, a - b).
    REGULAR: two bits at a time are H_4, y_i = x_i + x_{i^1} + x_{i^2} - x_{i^3}; of an odd number of bits the lowest is
    Sylvester's.
    """
    if REGULAR:
        SINGLE: tl.constexpr = (LAST - FIRST) % 2
        if SINGLE:
            x = _butterfly_2(x, SIZE, FIRST, FIRST + 1)
        for bit in tl.static_range(FIRST + SINGLE, LAST, 2):
            x = _butterfly_4(x, SIZE, bit)
    else:
        x = _butterfly_2(x, SIZE, FIRST, LAST)
    return x


@triton.jit
def _butterfly_2(x, SIZE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Sylvester's, bit by bit.

    The partner is the pair's sum less the element itself, on the bit patterns as integers: exact whatever overflows.
    The compiler folds that to the bare exchange: nothing within a thread, one shuffle between lanes.  tl.split and
    tl.join, the other way, move the tile through shared memory.
    """
    for bit in tl.static_range(FIRST, LAST):
        pairs = tl.reshape(x, (SIZE // 2 ** (bit + 1), 2, 2**bit))
        raw = pairs.to(tl.int32, bitcast=True)
        partner = (tl.sum(raw, 1, keep_dims=True) - raw).to(x.dtype, bitcast=True)
        second = tl.arange(0, 2)[None, :, None]
        if x.dtype == tl.float32:
            # ±x is exact, so this is the sum or the difference, rounded once, in one instruction and without a choice.
            sign = tl.broadcast_to(1.0 - 2.0 * second, pairs.shape)
            x = tl.reshape(tl.fma(pairs, sign, partner), x.shape)
        else:
            x = tl.reshape(tl.where(second == 1, partner - pairs, partner + pairs), x.shape)
    return x


@triton.jit
def _butterfly_4(x, SIZE: tl.constexpr, BIT: tl.constexpr):
    """H_4 along bits BIT and BIT + 1: y_i = u_i + v_{i^2} with u_i = x_i + x_{i^1} and v_i = x_i - x_{i^1}."""
    near = _partners(x, SIZE, BIT)
    return x + near + _partners(x - near, SIZE, BIT + 1)


@triton.jit
def _partners(x, SIZE: tl.constexpr, BIT: tl.constexpr):
    """Every element's partner along a bit, by the exchange that `_butterfly_2` makes."""
    pairs = tl.reshape(x, (SIZE // 2 ** (BIT + 1), 2, 2**BIT))
    raw = pairs.to(tl.int32, bitcast=True)
    return tl.reshape((tl.sum(raw, 1, keep_dims=True) - raw).to(x.dtype, bitcast=True), x.shape)


@triton.jit
def matrix_tile(BLOCK: tl.constexpr, ORDER: tl.constexpr, REGULAR: tl.constexpr):
    """H_BLOCK ⊗ identity as int8 [ORDER, ORDER]: ±1 inside diagonal blocks, 0 outside; BLOCK ≤ ORDER ≤ 256.

    Sylvester's: H[i, j] = (-1)^popcount(i & j).  REGULAR: with e = i ^ j the bits of e & (e >> 1), every other one, the
    pairs from the top; of an odd number of bits the lowest is that of i & j.
    ORDER is 32 or more because an int8 tl.dot takes no shorter product.
    """
    i = tl.arange(0, ORDER)[:, None]
    j = tl.arange(0, ORDER)[None, :]
    if REGULAR:
        # 0xAA are the orders 2·4^k, and the lower bits of their pairs.
        LONE: tl.constexpr = 1 if BLOCK & 0xAA else 0
        e = (i ^ j) & (BLOCK - 1)
        bits = (e & (e >> 1) & (0x55 << LONE)) ^ (i & j & LONE)
    else:
        bits = (i & j) & (BLOCK - 1)
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return tl.where(i // BLOCK == j // BLOCK, 1 - 2 * (bits & 1), 0).to(tl.int8)
