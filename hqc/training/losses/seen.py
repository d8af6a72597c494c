"""What a loss sees of one graph in one step."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Seen"]


@dataclass(frozen=True)
class Seen:
    """noise: the guided ε [N, …]. timestep: the sampler's, of all samples."""

    noise: Tensor
    timestep: float
