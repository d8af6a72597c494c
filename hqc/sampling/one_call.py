"""One call instead of a trajectory: the schedule of what is run once, at a fixed timestep or without one."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["OneCall"]


class OneCall:
    """A schedule of one timestep, after which nothing is sampled any more.

    timestep: of the call; programs that have none are called at 0, which they never see. around: the scheduler whose
    noise levels the model was trained with, for what needs them (`config`, `alphas_cumprod`).
    """

    def __init__(self, timestep: float = 0.0, around: Any = None) -> None:
        self.timesteps = torch.tensor([timestep])
        self.around = type(around).__name__
        self.config = getattr(around, "config", {})
        self.alphas_cumprod: Tensor | None = getattr(around, "alphas_cumprod", None)

    def set_timesteps(self, steps: int) -> None:
        """There is one, however many are asked for."""

    def step(self, noise: Tensor, timestep: Tensor, sample: Tensor) -> None:
        """Never called: the trajectory ends with the call."""
        raise NotImplementedError
