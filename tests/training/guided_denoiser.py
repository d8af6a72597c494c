"""A tiny guided denoiser with two trainable sites, its sampling task, and its quantisation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hqc.calibration import calibrate
from hqc.pipeline import run_pipeline
from hqc.program import Program
from hqc.recipes import Recipe
from hqc.sampling import Task
from hqc.sampling.task import trajectory

__all__ = ["Denoiser", "quantised", "task_with"]


class Denoiser(nn.Module):
    """ε(x, t, c): convolutions with 8-bit edges (`conv_in`, `conv_out`) around two 4-bit sites (`token`, `middle`)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 32, 3, padding=1)
        self.token = nn.Linear(32, 32)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)
        self.conv_out = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        hidden = self.conv_in(sample) + self.token(condition)[:, 0, :, None, None]
        hidden = hidden * (1 + (timestep / 1000).view(-1, 1, 1, 1))
        return self.conv_out(hidden + torch.tanh(self.middle(hidden)))  # [N, 4, 4, 4]


def task_with(scheduler: Callable[..., object]) -> Task:
    """Random conditions of eight classes, the null class of zeros, on the scheduler of that class."""
    table = torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(5))

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return table[torch.randint(0, 8, (n,), generator=generator)]

    return Task(lambda: scheduler(num_train_timesteps=100), (4, 4, 4), draw, lambda n: torch.zeros(n, 1, 32))


def quantised(teacher: Program, task: Task, recipe: Recipe, bits: str = "w4a4") -> Program:
    """The recipe's passes and calibration, as `hqc.quantise` does them, on four images."""

    def run(denoise: object) -> None:
        for _ in trajectory(task, denoise, 4, 4, 1.5, 0.0, 1):  # type: ignore[arg-type]
            pass

    return calibrate(run_pipeline(teacher, recipe.passes(bits, task.timesteps(4))), run, candidates=20)
