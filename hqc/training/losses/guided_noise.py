"""The noise after guidance: what the sampler steps with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from hqc.program import Program
from hqc.steps import check_options
from hqc.training.losses.seen import Seen

__all__ = ["GuidedNoise", "weighed_squares"]


@dataclass(frozen=True)
class GuidedNoise:
    """weight·Σ w_n·(ε̂ - ε)² over all elements, ε = ε_u + g·(ε_c - ε_u); w_n weighs the sampler's steps.

    Source: HQ-DM; EfficientDM (arXiv 2310.03270).
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    window: ClassVar[int] = 1
    in_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def taps(self, program: Program) -> Mapping[str, str]:
        """It needs no more than the noise."""
        return {}

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        """The loss, a scalar."""
        found = weighed_squares(student.noise, teacher.noise, teacher.weight)
        return found if self.weight == 1 else found * self.weight


def weighed_squares(found: Tensor, wanted: Tensor, weight: Tensor | float | None) -> Tensor:
    """Σ w_n·(found - wanted)² over all elements of [N, …]; weight is a number or [N], None is 1."""
    squares = (found - wanted).square()
    if isinstance(weight, Tensor):
        return (squares.flatten(1).sum(1) * weight).sum()
    total = squares.sum()
    return total if weight is None else total * weight
