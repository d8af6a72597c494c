"""Which rotations there are: two kinds of Hadamard matrices and the orders of each.

    sylvester   H_2n = [[H_n, H_n], [H_n, -H_n]]; its first column is all ones, so that channels with a common mean end
                up in one coordinate
    regular     Kronecker powers of H_4, which is -1 on its second diagonal and 1 elsewhere: every row of order 4^k sums
                to √n, so that a common mean stays spread out.  Order 32 is H_4 ⊗ H_4 ⊗ H_2, half way between the two.

Both are symmetric, have entries ±1, and H·H = n·I.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

__all__ = ["KINDS", "ORDERS", "Kind", "Rotation", "block_size"]

Kind: TypeAlias = Literal["sylvester", "regular"]

ORDERS: Mapping[str, tuple[int, ...]] = {"sylvester": (8, 16, 32, 64, 128), "regular": (16, 32, 64, 256)}
"""The orders of each kind, ascending."""
KINDS: tuple[str, ...] = tuple(ORDERS)


class Rotation(NamedTuple):
    """The order of the matrix along the channels, block by block, and its kind."""

    block: int
    regular: bool = False

    @property
    def kind(self) -> Kind:
        """The kind by name."""
        return "regular" if self.regular else "sylvester"

    @property
    def flag(self) -> tuple[bool, ...]:
        """The operators' last argument: unwritten for Sylvester's kind, the default, as in graphs of older versions."""
        return (True,) if self.regular else ()

    def __str__(self) -> str:
        """What people read.

        >>> str(Rotation(32)), str(Rotation(64, regular=True))
        ('H32', 'regular H64')
        """
        return f"{'regular ' if self.regular else ''}H{self.block}"


def block_size(channels: int, wanted: int, kind: str = "sylvester") -> int:
    """The largest order of a kind that is at most `wanted` and divides `channels`, else 0.

    >>> block_size(320, 32), block_size(48, 32), block_size(3, 32)
    (32, 16, 0)
    >>> block_size(320, 256, "regular"), block_size(96, 64, "regular"), block_size(8, 64, "regular")
    (64, 32, 0)
    """
    return max((order for order in ORDERS[kind] if order <= wanted and channels % order == 0), default=0)
