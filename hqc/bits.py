"""Widths of weights and activations, and the ranges of codes that they stand for."""

import re
from dataclasses import dataclass

from hqc.errors import PlanError

__all__ = [
    "HIGHEST_ASYMMETRIC_BITS",
    "HIGHEST_BITS",
    "HIGHEST_LOOKUP_BITS",
    "HIGHEST_MIXED_BITS",
    "LOWEST_BITS",
    "Bits",
    "activation_range",
    "asymmetric_top",
    "parse_bits",
    "weight_range",
]

LOWEST_BITS, HIGHEST_BITS = 2, 8
HIGHEST_ASYMMETRIC_BITS = 7
"""With 8 bits codes q - z reach from -255 to 255, which int8 does not hold."""
HIGHEST_MIXED_BITS = HIGHEST_ASYMMETRIC_BITS - 1
"""Output channels of a mixed weight have a bit more or less."""


HIGHEST_LOOKUP_BITS = 4
"""The tables of a weight have 2ⁿ entries for each output channel; of more, an int8 grid holds too many."""


@dataclass(frozen=True)
class Bits:
    """Weight and activation widths, each 2…8."""

    weight: int
    activation: int

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


def parse_bits(text: str) -> Bits:
    """Reads `wNaM`, case-insensitive, N and M in 2…8.

    >>> parse_bits("W4A3")
    Bits(weight=4, activation=3)

    Raises:
        PlanError: for anything else.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower())
    bits = Bits(int(match[1]), int(match[2])) if match else None
    if bits is None or not all(LOWEST_BITS <= b <= HIGHEST_BITS for b in (bits.weight, bits.activation)):
        raise PlanError(
            f"bits {text!r}",
            f"expected wNaM with N and M in {LOWEST_BITS}…{HIGHEST_BITS}",
            "Use for example w4a4, w4a3 or w8a8.",
        )
    return bits


def activation_range(bits: int) -> tuple[int, int]:
    """Symmetric narrow range of activation codes: ±(2^(n-1) - 1); A4 is -7…7.

    >>> activation_range(4), activation_range(3)
    ((-7, 7), (-3, 3))
    """
    top = 2 ** (bits - 1) - 1
    return -top, top


def weight_range(bits: int) -> tuple[int, int]:
    """Symmetric full range of weight codes: -2^(n-1)…2^(n-1) - 1; W4 is -8…7.

    >>> weight_range(4)
    (-8, 7)
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def asymmetric_top(bits: int) -> int:
    """2ⁿ - 1: codes of an asymmetric range are -z…2ⁿ-1-z for a zero point z in 0…2ⁿ-1.

    >>> asymmetric_top(4)
    15
    """
    return (1 << bits) - 1
