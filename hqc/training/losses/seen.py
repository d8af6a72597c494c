"""What a loss sees of one graph in one step."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Seen"]


@dataclass(frozen=True)
class Seen:
    """noise: the guided ε [N, …]. weight: of the samples, a number or [N]; None is 1."""

    noise: Tensor
    weight: Tensor | float | None = None
