"""The distillation loop: the quantised graph learns the float graph's noise along the float sampler's trajectory.

    each epoch   a seed of its own; random classes; x_T ~ N(0, I)
    each step    ε = teacher, ε̂ = student on the same x_t, both combined by guidance
                 L = Σ (ε̂ - ε)² over all elements;  AdamW;  linear decay
                 x_{t-1} = sampler step with the teacher's ε (no student roll-out)

LoRA factors learn at lr_lora·mean(s_w) of their own site, so that a step is the same fraction of every site's grid;
scales have no weight decay and stay positive. Every random number comes from (seed, epoch, step), so a run that was
killed continues to the same bits. Source: HQ-DM training loop; EfficientDM scale-aware LoRA (arXiv 2310.03270).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqc.errors import ArtefactError, TrainingError
from hqc.program import Program, Stage
from hqc.recipes import TrainingSettings
from hqc.sampling.task import Task, advance, denoiser, guided, initial_sample, scaled_input, start
from hqc.training.checkpoint import Checkpoint
from hqc.training.module import training_module

__all__ = ["StepRecord", "distil"]

_SMALLEST_SCALE = 1e-8


@dataclass(frozen=True)
class StepRecord:
    """One update: its number from 1, of how many, the timestep, the loss (sum of squares), mean squares, seconds."""

    step: int
    total: int
    epoch: int
    timestep: float
    loss: float
    relative_error: float
    seconds: float


def trainable(program: Program) -> dict[str, str]:
    """Names of the tensors that training changes, with their group: lora, weight_scale or activation_scale."""
    groups = {}
    for plan in program.plan.sites:
        if plan.lora_rank:
            groups[f"{plan.site}.lora_a"] = groups[f"{plan.site}.lora_b"] = "lora"
            groups[f"{plan.site}.weight_scale"] = "weight_scale"
            groups[f"{plan.site}.activation_scale_table"] = "activation_scale"
    return groups


def _optimizer(program: Program, parameters: dict[str, nn.Parameter], settings: TrainingSettings) -> torch.optim.AdamW:
    """Parameters with the same rate and decay are one group: the optimiser takes each group in one call."""
    rates = {"weight_scale": settings.lr_weight_scale, "activation_scale": settings.lr_activation_scale}
    members: dict[tuple[float, float], list[str]] = {}
    for name, kind in trainable(program).items():
        rate, decay = rates.get(kind, 0.0), 0.0
        if kind == "lora":
            site = name.rsplit(".", 1)[0]
            rate, decay = settings.lr_lora * float(program.state[f"{site}.weight_scale"].mean()), settings.weight_decay
        members.setdefault((rate, decay), []).append(name)
    groups = [
        {"params": [parameters[name] for name in names], "names": names, "lr": r, "base_lr": r, "weight_decay": decay}
        for (r, decay), names in members.items()
    ]
    return torch.optim.AdamW(groups, fused=True)


def distil(
    student: Program,
    teacher: Program,
    task: Task,
    settings: TrainingSettings,
    *,
    resume: Checkpoint | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_checkpoint: Callable[[Checkpoint], None] | None = None,
) -> Program:
    """Trains a quantised program against the captured one and returns it at stage `trained`.

    Args:
        student: a calibrated program with LoRA. teacher: the captured program. task: what is sampled.
        resume: continue from there, to the same bits as an uninterrupted run.
        on_step: called after every update. on_checkpoint: called every `settings.checkpoint_every` updates.

    Raises:
        TrainingError: if the loss is not finite, naming the step. ArtefactError: a checkpoint of another program.
    """
    samples = settings.batch_size * (2 if task.doubles(settings.guidance_scale) else 1)
    module, teacher_module = training_module(student, samples), teacher.module()
    names = trainable(student)
    parameters = {name: _own_parameter(module, name) for name in names}
    optimizer = _optimizer(student, parameters, settings)
    denoise, denoise_teacher = denoiser(module), denoiser(teacher_module)
    length = len(task.scheduler(settings.num_inference_steps).timesteps)
    total, first = settings.total_steps, 0
    if resume is not None:
        first = resume.step
        _restore(optimizer, parameters, resume)
    # A trajectory that was cut is walked again from its start without the student: samplers may have a memory.
    for step in range(first - first % length, total):
        began = time.perf_counter()
        epoch, index = divmod(step, length)
        if index == 0:
            scheduler = task.scheduler(settings.num_inference_steps)
            noise, conditions = start(task, settings.batch_size, _generator(settings.seed, epoch, 0))
            sample = initial_sample(task, scheduler, noise)
        timestep = scheduler.timesteps[index]
        time_input = float(timestep) * task.time_scale
        model_input = scaled_input(task, scheduler, sample, timestep)
        with torch.no_grad():
            wanted = guided(denoise_teacher, model_input, time_input, conditions, settings.guidance_scale)
        sample = advance(scheduler, wanted, timestep, sample, settings.eta, _generator(settings.seed, epoch, index + 1))
        if step < first:
            continue
        found = guided(denoise, model_input, time_input, conditions, settings.guidance_scale)
        loss = (found - wanted).square().sum()
        value = float(loss.detach())
        if not value < float("inf"):
            raise TrainingError(
                f"training step {step + 1}", f"the loss is {value}", "Lower --lr-lora or the bits' risk."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 - step / total)
        optimizer.step()
        _keep_positive(parameters, names)
        if on_step is not None:
            relative = value / float(wanted.square().sum())
            on_step(StepRecord(step + 1, total, epoch, float(timestep), value, relative, time.perf_counter() - began))
        if on_checkpoint is not None and (step + 1) % settings.checkpoint_every == 0 and step + 1 < total:
            on_checkpoint(_snapshot(step + 1, optimizer, parameters))
    state = dict(student.state) | {name: p.detach().clone() for name, p in parameters.items()}
    return student.evolve(state=state, stage=Stage.TRAINED)


def _own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A trainable copy of one weight, so that the program's own tensors stay as they are."""
    path, leaf = name.rsplit(".", 1)
    parameter = nn.Parameter(module.get_parameter(name).detach().clone())
    setattr(module.get_submodule(path), leaf, parameter)
    return parameter


def _generator(*numbers: int) -> torch.Generator:
    """A generator seeded by (seed, epoch, step): three numbers mixed into one 63-bit seed."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


@torch.no_grad()
def _keep_positive(parameters: dict[str, nn.Parameter], names: dict[str, str]) -> None:
    scales: list[Tensor] = [parameters[name] for name, kind in names.items() if kind != "lora"]
    torch._foreach_clamp_min_(scales, _SMALLEST_SCALE)


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
