"""Which rotation a recipe is asked for, as the step that makes it."""

from typing import Literal

from hqc.passes import InsertHadamard
from hqc.pipeline import Step

__all__ = ["Rotation", "rotation"]

Rotation = Literal["sylvester"]


def rotation(kind: Rotation, order: int | None = None) -> Step:
    """The step that rotates that way, with blocks of that order; None is the usual one."""
    return InsertHadamard(block=order or 32)
