"""The noise after guidance: what the sampler steps with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from hqc.program import Program
from hqc.steps import check_options
from hqc.training.losses.seen import Seen

__all__ = ["GuidedNoise"]


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
        squares = (student.noise - teacher.noise).square()
        found = squares.sum()
        if isinstance(teacher.weight, Tensor):
            found = (squares.flatten(1).sum(1) * teacher.weight).sum()
        elif teacher.weight is not None:
            found = found * teacher.weight
        return found if self.weight == 1 else found * self.weight
