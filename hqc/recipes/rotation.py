"""Which rotation a recipe is asked for, as the step that makes it."""

from typing import Literal

from hqc.calibration import ChooseRotation
from hqc.errors import PlanError
from hqc.passes import InsertHadamard
from hqc.pipeline import Step

__all__ = ["Rotation", "rotation"]

Rotation = Literal["sylvester", "regular", "auto"]
_USUAL = {"sylvester": 32, "regular": 16}


def rotation(kind: Rotation, order: int | None = None) -> Step:
    """The step that rotates that way, with blocks of that order; None is the usual one. "auto" chooses at every site.

    Raises:
        PlanError: for an order that the kind does not have, or any with "auto".
    """
    if kind == "auto":
        if order is not None:
            raise PlanError(f"--block {order}", "and --hadamard auto exclude each other", "It chooses the order.")
        return ChooseRotation()
    return InsertHadamard(block=order or _USUAL[kind], kind=kind)
