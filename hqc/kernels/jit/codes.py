"""From real levels to integer codes, shared by every kernel that quantises."""

import triton
import triton.language as tl

__all__ = ["inverse_at", "nibbles", "row_codes", "sample_codes", "to_codes"]


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
def inverse_at(inverse_scale_ptr, sample, LOW: tl.constexpr):
    """Where 1/s of a sample lies: numbers [N], or with bounds that are looked up [N, 3], 1/s, least and largest code.

    LOW is None then, and HIGH.
    """
    STEP: tl.constexpr = 3 if LOW is None else 1
    return inverse_scale_ptr + sample * STEP


@triton.jit
def _codes_between(levels, low, high):
    """As `to_codes`, with bounds in float32 that broadcast over the levels."""
    raw = (levels + 12582912.0).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(raw, low.to(tl.int32) + 0x4B400000), high.to(tl.int32) + 0x4B400000)


@triton.jit
def sample_codes(levels, inverse_scale_ptr, sample, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes of levels of one sample."""
    if LOW is None:
        at = inverse_at(inverse_scale_ptr, sample, LOW)
        codes = _codes_between(levels, tl.load(at + 1), tl.load(at + 2))
    else:
        codes = to_codes(levels, LOW, HIGH)
    return codes


@triton.jit
def row_codes(levels, inverse_scale_ptr, sample, inside, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes of levels [R, C]; the sample of each row [R], and whether the row is inside."""
    if LOW is None:
        at = inverse_at(inverse_scale_ptr, sample, LOW)
        low, high = tl.load(at + 1, inside, other=0.0), tl.load(at + 2, inside, other=0.0)
        codes = _codes_between(levels, low[:, None], high[:, None])
    else:
        codes = to_codes(levels, LOW, HIGH)
    return codes


@triton.jit
def nibbles(codes, SHAPE: tl.constexpr):
    """Two codes a byte, the first in the low nibble: int32 [R, 2·K] -> uint8 SHAPE = (R, K)."""
    low, high = tl.split(tl.reshape(codes, (SHAPE[0], SHAPE[1], 2)))
    return ((low & 15) | ((high & 15) << 4)).to(tl.uint8)
