"""From real levels to integer codes, shared by every kernel that quantises."""

import triton
import triton.language as tl

__all__ = ["nibbles", "to_codes"]


@triton.jit
def to_codes(levels, LOW: tl.constexpr, HIGH: tl.constexpr):
    """clip(round half to even) of float32 levels; int32 whose lowest byte is the code.

    1.5·2^23 + q has q's two's complement in its lowest bits, rounded half to even by the addition itself: no
    conversion instruction (a quarter of the rate of an addition) and no libdevice.  What is clipped is the bit pattern,
    as an integer: floats of one sign are ordered as their bits are, so levels of any size end at a bound.

    It must be an integer operation that makes the last value: from the sum itself, whose register has no type in PTX,
    ptxas (12.8 to 13.0) stores a single byte by converting a float to u8.
    """
    raw = (levels + 12582912.0).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(raw, 0x4B400000 + LOW), 0x4B400000 + HIGH)


@triton.jit
def nibbles(codes, SHAPE: tl.constexpr):
    """Two codes a byte, the first in the low nibble: int32 [R, 2·K] -> uint8 SHAPE = (R, K)."""
    low, high = tl.split(tl.reshape(codes, (SHAPE[0], SHAPE[1], 2)))
    return ((low & 15) | ((high & 15) << 4)).to(tl.uint8)
