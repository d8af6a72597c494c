"""A tiny guided denoiser with two trainable sites, its sampling task, and its quantisation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hqc.checkpoint import Checkpoint
from hqc.pipeline import run_procedure
from hqc.program import Program
from hqc.recipes import Recipe
from hqc.recipes.run import Request, run_recipe
from hqc.sampling import Sampler, Task, Update, Validation, Work
from hqc.steps import step_name
from hqc.training import Distil, Group
from hqc.training.groups import trainable

__all__ = ["Denoiser", "Settings", "distil", "quantised", "task_with", "trained_tensors"]


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
    steps = tuple(s for s in recipe.set("attach_lora.rank", 4).steps if step_name(type(s)) != "distil")
    short = replace(recipe, steps=steps, sampler=Sampler(num_inference_steps=4))
    short = short.having("calibrate_activations", samples=4, candidates=20, seed=1)
    request = Request(bits, timesteps=task.timesteps(4))
    return run_recipe(teacher, short, request, Work(teacher, task, short.sampler))


@dataclass(frozen=True)
class Settings:
    """HQ-DM's training with other numbers."""

    epochs: int = 3
    steps: int | None = None
    batch_size: int = 4
    num_inference_steps: int = 4
    guidance_scale: float = 1.5
    eta: float = 0.0
    seed: int = 3407
    lr_lora: float = 3e-2
    lr_weight_scale: float = 1e-5
    lr_activation_scale: float = 1e-3
    weight_decay: float = 0.01
    checkpoint_every: int = 3
    more: Mapping[str, Any] = field(default_factory=dict)

    def having(self, changes: Mapping[str, Any]) -> "Settings":
        """With some of them changed."""
        return replace(self, **changes)

    @property
    def total_steps(self) -> int:
        """Updates in all."""
        return self.steps or self.epochs * self.num_inference_steps

    @property
    def step(self) -> Distil:
        """The step that trains so."""
        groups = (
            Group("*.lora_?", rate=self.lr_lora, relative="weight_scale", decay=self.weight_decay),
            Group("*.weight_scale", rate=self.lr_weight_scale, positive=True),
            Group("*.activation_scale_table", rate=self.lr_activation_scale, positive=True),
        )
        return Distil(
            groups=groups,
            epochs=self.epochs,
            updates=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
            **self.more,
        )


def trained_tensors(program: Program) -> dict[str, Group]:
    """What HQ-DM trains, with its group."""
    return trainable(program, Settings().step.groups)


def distil(
    student: Program,
    teacher: Program,
    task: Task,
    settings: Settings,
    *,
    resume: Checkpoint | None = None,
    on_step: Callable[[Update], None] | None = None,
    on_checkpoint: Callable[[Checkpoint], None] | None = None,
    on_validation: Callable[[Validation], None] | None = None,
) -> Program:
    """Runs the step."""
    sampler = Sampler(settings.num_inference_steps, settings.guidance_scale, settings.eta)
    work = Work(teacher, task, sampler, None, resume, on_checkpoint, on_step, on_validation)
    return run_procedure(student, settings.step, work)
