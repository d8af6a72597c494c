"""What every loss says of itself, and the weighed sum of squares that most of them are."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from hqc.program import Program
from hqc.steps import check_options

__all__ = ["Term", "weighed_squares"]


class Term:
    """A loss; a frozen dataclass of its options inherits from it.

    window: of how many neighbouring steps it sees values. in_order: whether it needs the steps in the sampler's order.
    tapped: whether it sees more than the noise. by_layer: whether that is of the student's own layers, so that the
    teacher has to have them. in_images: whether it asks how far an error of the noise moves the image.
    """

    window: ClassVar[int] = 1
    in_order: ClassVar[bool] = False
    tapped: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False
    in_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def taps(self, program: Program) -> Mapping[str, str]:
        """The nodes whose values it sees besides the noise, by its own names of them."""
        return {}


def weighed_squares(found: Tensor, wanted: Tensor, weight: Tensor | float | None) -> Tensor:
    """Σ w_n·(found - wanted)² over all elements of [N, …]; weight is a number or [N], None is 1.

    Both halves of guidance, [2·N, …], have the weights [N] of their samples.
    """
    squares = (found - wanted).square()
    if isinstance(weight, Tensor):
        return (squares.flatten(1).sum(1) * weight.repeat(len(found) // len(weight))).sum()
    total = squares.sum()
    return total if weight is None else total * weight
