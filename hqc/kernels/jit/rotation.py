"""Hadamard's matrix inside a kernel: as a butterfly over a tile, and as a ±1 tile for an integer product."""

import triton
import triton.language as tl

__all__ = ["butterfly", "sylvester_tile"]


@triton.jit
def butterfly(x, SIZE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """One addition and one subtraction per bit FIRST…LAST-1 of the flat index of x [SIZE elements], any shape.

    Bit i of the index pairs elements 2^i apart: (a, b) -> (a + b, a - b).  All bits of a block of order b in turn are
    H_b·x, unnormalised.

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
def sylvester_tile(BLOCK: tl.constexpr, ORDER: tl.constexpr):
    """H_BLOCK ⊗ identity as int8 [ORDER, ORDER]: ±1 inside diagonal blocks, 0 outside; BLOCK ≤ ORDER ≤ 256.

    H[i, j] = (-1)^popcount(i & j).  ORDER is 32 or more because an int8 tl.dot takes no shorter product.
    """
    i = tl.arange(0, ORDER)[:, None]
    j = tl.arange(0, ORDER)[None, :]
    bits = (i & j) & (BLOCK - 1)
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return tl.where(i // BLOCK == j // BLOCK, 1 - 2 * (bits & 1), 0).to(tl.int8)
