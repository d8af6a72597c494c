"""Distillation: the quantised graph learns the float graph's noise along the float sampler's trajectory.

    each epoch   a seed of its own; random conditions; x_T ~ N(0, I)
    each step    ε = teacher, ε̂ = student on the same x_t, both combined by guidance
                 L = the sum of the losses;  AdamW;  linear decay
                 x_{t-1} = sampler step with the teacher's ε (no student roll-out)

Every random number comes from (seed, epoch, step), so a run that was killed continues to the same bits.
Source: HQ-DM's training loop; EfficientDM (arXiv 2310.03270).
"""

import time
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hqc.checkpoint import Checkpoint
from hqc.errors import ArtefactError, PlanError, TrainingError
from hqc.memory import require_memory, training_bytes
from hqc.program import Program, Stage
from hqc.sampling import Update, Work, guided
from hqc.sampling.task import denoiser
from hqc.steps import check_options
from hqc.training.groups import Group, optimizer_of, trainable
from hqc.training.losses import GuidedNoise, Loss, Seen
from hqc.training.module import training_module
from hqc.training.trajectories import State, visited

__all__ = ["Distil"]

_SMALLEST_SCALE = 1e-8


@dataclass(frozen=True)
class Distil:
    """Trains the tensors of the groups: `epochs` trajectories of the sampler, an update a step of them.

    updates: that many in all instead. batch_size: images of a trajectory. seed: of noise and conditions.
    checkpoint_every: updates between checkpoints; it does not change the result.
    """

    losses: tuple[Loss, ...] = (GuidedNoise(),)
    groups: tuple[Group, ...] = ()
    epochs: Annotated[int, Field(ge=1)] = 30
    updates: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    seed: Annotated[int, Field(ge=0)] = 3407
    checkpoint_every: Annotated[int, Field(ge=1)] = field(default=200, compare=False)

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED, Stage.TRAINED)
    gives: ClassVar[Stage | None] = Stage.TRAINED
    samples_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)
        if not self.losses or not self.groups:
            raise PlanError("distil", "has no losses or no groups", "Say what is lowered, and which tensors learn.")

    def total(self, work: Work) -> int:
        """Updates in all."""
        return self.updates or self.epochs * work.sampler.num_inference_steps

    def cost(self, program: Program, work: Work) -> float:
        """A step runs the teacher once and the student forward and backward: 4 evaluations a sample."""
        return float(4 * self.total(work) * self.batch_size * work.halves())

    def check(self, program: Program, work: Work) -> None:
        """A step runs a batch, twice as large with guidance, and keeps what the backward pass needs.

        Raises:
            MemoryShortError: if that does not fit.
        """
        require_memory(
            f"training on batches of {self.batch_size}",
            program.size_bytes() + training_bytes(program, self.batch_size * work.halves()),
            "Take a smaller --batch-size, close other programs, or take a larger machine",
        )

    def run(self, program: Program, work: Work) -> Program:
        """The trained program.

        Raises:
            TrainingError: if the loss is not finite, naming the step. ArtefactError: a checkpoint of another program.
        """
        task, sampler, total = work.sampled, work.sampler, self.total(work)
        module, names = training_module(program, self.batch_size * work.halves()), trainable(program, self.groups)
        parameters = {name: _own_parameter(module, name) for name in names}
        optimizer = optimizer_of(program, names, parameters)
        if work.checkpoint is not None:
            _restore(optimizer, parameters, work.checkpoint)
        first = work.checkpoint.step if work.checkpoint is not None else 0
        denoise, teacher = denoiser(module), denoiser(work.teacher.module())
        scales: list[Tensor] = [parameters[name] for name, group in names.items() if group.positive]
        began = time.perf_counter()
        walk = visited(task, sampler, teacher, batch_size=self.batch_size, seed=self.seed, first=first, total=total)
        for state in walk:
            found = guided(denoise, state.sample, state.time_input, state.conditions, sampler.guidance_scale)
            loss = self._loss(found, state)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * (1 - state.step / total)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_clamp_min_(scales, _SMALLEST_SCALE)
            done = state.step + 1
            if work.on_update is not None:
                work.on_update(_update(state, total, found, loss, time.perf_counter() - began))
            if work.on_checkpoint is not None and done % self.checkpoint_every == 0 and done < total:
                work.on_checkpoint(_snapshot(done, optimizer, parameters))
            began = time.perf_counter()
        values = dict(program.state) | {name: p.detach().clone() for name, p in parameters.items()}
        return program.evolve(state=values)

    def _loss(self, found: Tensor, state: State) -> Tensor:
        student, teacher = Seen(found, state.timestep), Seen(state.wanted, state.timestep)
        first, *more = (loss(student, teacher) for loss in self.losses)
        for one in more:
            first = first + one
        value = float(first.detach())
        if not value < float("inf"):
            raise TrainingError(
                f"training step {state.step + 1}", f"the loss is {value}", "Lower --lr-lora or the bits' risk."
            )
        return first


def _update(state: State, total: int, found: Tensor, loss: Tensor, seconds: float) -> Update:
    error = float((found.detach() - state.wanted).square().sum() / state.wanted.square().sum())
    return Update(state.step + 1, total, state.epoch, state.timestep, float(loss.detach()), error, seconds)


def _own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A trainable copy of one weight, so that the program's own tensors stay as they are."""
    path, leaf = name.rsplit(".", 1)
    parameter = nn.Parameter(module.get_parameter(name).detach().clone())
    setattr(module.get_submodule(path), leaf, parameter)
    return parameter


def _snapshot(step: int, optimizer: torch.optim.AdamW, parameters: dict[str, nn.Parameter]) -> Checkpoint:
    tensors = {}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        tensors[f"value/{name}"] = parameter.detach().clone()
        tensors[f"mean/{name}"] = moments["exp_avg"].clone()
        tensors[f"square/{name}"] = moments["exp_avg_sq"].clone()
    return Checkpoint(step, tensors)


@torch.no_grad()
def _restore(optimizer: torch.optim.AdamW, parameters: dict[str, nn.Parameter], saved: Checkpoint) -> None:
    for name, parameter in parameters.items():
        value, mean, square = (_saved(saved, f"{kind}/{name}", parameter) for kind in ("value", "mean", "square"))
        parameter.copy_(value)
        optimizer.state[parameter] = {
            "step": torch.tensor(float(saved.step)),
            "exp_avg": mean.clone(),
            "exp_avg_sq": square.clone(),
        }


def _saved(saved: Checkpoint, name: str, parameter: Tensor) -> Tensor:
    tensor = saved.tensors.get(name)
    if tensor is None or tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        raise ArtefactError("checkpoint", f"has no {name} as this program needs it", "Start again without --resume.")
    return tensor
