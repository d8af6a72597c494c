"""The noise after guidance: what the sampler steps with."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from hqc.training.losses.seen import Seen
from hqc.training.losses.term import Term, weighed_squares

__all__ = ["GuidedNoise"]


@dataclass(frozen=True)
class GuidedNoise(Term):
    """weight·Σ w_n·(ε̂ - ε)² over all elements, ε = ε_u + g·(ε_c - ε_u); w_n weighs the sampler's steps.

    Source: HQ-DM; EfficientDM (arXiv 2310.03270).
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    tapped: ClassVar[bool] = False

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        """The loss, a scalar."""
        found = weighed_squares(student.noise, teacher.noise, teacher.weight)
        return found if self.weight == 1 else found * self.weight
