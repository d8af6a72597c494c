"""A tiny denoiser with blocks, a shortcut over a concatenation and a shared weight, quantised, and its task."""

from dataclasses import replace

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from hqc.calibration import CalibrateActivations, CalibrateWeights
from hqc.capture import capture_module
from hqc.passes import InsertQdq, SelectLayers, SplitConcat
from hqc.pipeline import run_pipeline, run_procedure
from hqc.program import InputSpec, Program
from hqc.sampling import Sampler, Task, Work

__all__ = ["captured", "quantised", "task", "unquantised", "work"]


class _Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_shortcut(x) + self.conv2(torch.tanh(self.conv1(torch.tanh(x))))


class Denoiser(nn.Module):
    """ε(x, t, c): `resnets.0`, a layer of the condition, `resnets.1` over a concatenation, one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.resnets = nn.ModuleList([_Block(8, 8), _Block(16, 8)])
        self.token, self.twice = nn.Linear(5, 8), nn.Conv2d(8, 8, 1)
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        skip = self.conv_in(sample) * (1 + (timestep / 1000).view(-1, 1, 1, 1))
        hidden = self.resnets[0](skip) + self.token(condition)[:, :, None, None]
        hidden = self.resnets[1](torch.cat([hidden, 5 * skip], 1))
        return self.conv_out(hidden + 0.1 * self.twice(torch.tanh(self.twice(hidden))))  # [N, 3, 4, 4]


def captured() -> Program:
    """Its program."""
    torch.manual_seed(4)
    inputs = (InputSpec("sample", ("N", 3, 4, 4)), InputSpec("timestep", ("N",)), InputSpec("condition", ("N", 5)))
    return capture_module(Denoiser(), inputs)


def task() -> Task:
    """Random conditions, the null one of zeros."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 5, generator=generator)

    return Task(lambda: DDIMScheduler(num_train_timesteps=100), (3, 4, 4), draw, lambda n: torch.zeros(n, 5))


def unquantised(program: Program, bits: str = "w3a4") -> Program:
    """Split, and its layers selected."""
    return run_pipeline(program, [SplitConcat(), SelectLayers(bits=bits, rules="all")])


def work(program: Program, **more: object) -> Work:
    """What to sample: four steps with guidance. program: the captured one, selected."""
    around = Work(program, task(), Sampler(4))
    return replace(around, unquantised=program, **more)  # type: ignore[arg-type]


def quantised(program: Program, weight: str = "symmetric") -> Program:
    """Of the selected program: quantisers of one row, calibrated."""
    inserted = run_pipeline(program, [InsertQdq(activation="asymmetric", weight=weight, static=True)])  # type: ignore[arg-type]
    found = run_procedure(inserted, CalibrateWeights(), work(program))
    return run_procedure(found, CalibrateActivations(samples=4, candidates=20), work(program))
