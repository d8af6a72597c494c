"""The image that a step's noise stands for: errors are weighed by how far they move it."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from hqc.training.losses.seen import Seen
from hqc.training.losses.term import Term

__all__ = ["InImageSpace"]


@dataclass(frozen=True)
class InImageSpace(Term):
    """weight·Σ (x̂_0 - x_0)² over all elements, x_0 = x_t/√ᾱ - √((1-ᾱ)/ᾱ)·ε what the output says the image is.

    Both share x_t, so that it is Σ k²·(ε̂ - ε)² with k = √((1-ᾱ)/ᾱ) (`hqc.sampling.image_gain`, which knows the other
    kinds of prediction); the output of a half of an autoencoder is an image or its latents itself, k = 1.
    Source: PassionSR (arXiv 2411.17106).
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    tapped: ClassVar[bool] = False
    in_images: ClassVar[bool] = True

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        """The loss, a scalar."""
        squares = (student.noise - teacher.noise).square().flatten(1).sum(1)
        if teacher.image_gain is not None:
            squares = squares * teacher.image_gain**2
        if teacher.weight is not None:
            squares = squares * teacher.weight
        return self.weight * squares.sum()
