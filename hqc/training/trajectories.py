"""The states that training visits: the float model's trajectories, one after the other, reproducible from anywhere."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hqc.sampling import Sampler, Task, guided
from hqc.sampling.task import Conditions, Denoise, advance, initial_sample, scaled_input, start

__all__ = ["State", "generator", "visited"]


@dataclass(frozen=True)
class State:
    """One step of a trajectory: the denoiser's input there, its conditions, and the teacher's guided noise.

    step: counted from 0 over all epochs. timestep: the scheduler's; time_input: what the denoiser is given for it.
    """

    step: int
    epoch: int
    timestep: float
    time_input: float
    sample: Tensor
    conditions: Conditions | None
    wanted: Tensor


def visited(
    task: Task, sampler: Sampler, denoise: Denoise, *, batch_size: int, seed: int, first: int, total: int
) -> Iterator[State]:
    """The states of the steps `first` … `total` - 1 along the trajectories of `denoise`.

    An epoch is a trajectory. Every random number comes from (seed, epoch, step). A trajectory that was cut is walked
    again from its start: samplers may have a memory.
    """
    length = len(task.scheduler(sampler.num_inference_steps).timesteps)
    for step in range(first - first % length, total):
        epoch, index = divmod(step, length)
        if index == 0:
            scheduler = task.scheduler(sampler.num_inference_steps)
            noise, conditions = start(task, batch_size, generator(seed, epoch, 0))
            sample = initial_sample(task, scheduler, noise)
        timestep = scheduler.timesteps[index]
        time_input = float(timestep) * task.time_scale
        model_input = scaled_input(task, scheduler, sample, timestep)
        with torch.no_grad():
            wanted = guided(denoise, model_input, time_input, conditions, sampler.guidance_scale)
        sample = advance(scheduler, wanted, timestep, sample, sampler.eta, generator(seed, epoch, index + 1))
        if step >= first:
            yield State(step, epoch, float(timestep), time_input, model_input, conditions, wanted)


def generator(*numbers: int) -> torch.Generator:
    """A generator seeded by (seed, epoch, step): three numbers mixed into one 63-bit seed."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)
