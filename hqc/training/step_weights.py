"""What an error of the noise costs at each step of the sampler, measured on the calibrated student.

    w_t ∝ median over images of ‖x_0(student at t alone) - x_0‖ / ‖ε̂_t - ε_t‖,   mean 1, within [0.05, 10]

x_0(student at t alone) is where the sampler ends when the student replaces the teacher in that one step. The summed
error of ε weighs late steps most, which hardly move the image. Source: own.
"""

import torch
from torch import Tensor

from hqc.sampling import Sampler, Task, guided
from hqc.sampling.task import Denoise, advance, initial_sample, scaled_input, start
from hqc.stages import doing
from hqc.training.trajectories import generator

__all__ = ["step_weights"]

_LEAST, _MOST = 0.05, 10.0


@torch.no_grad()
def step_weights(
    task: Task, sampler: Sampler, teacher: Denoise, student: Denoise, *, samples: int, seed: int
) -> tuple[float, ...]:
    """One weight a step of the schedule, mean 1 before the bounds."""
    length = len(task.scheduler(sampler.num_inference_steps).timesteps)
    plain, _ = _roll(task, sampler, teacher, student, samples, seed, None)
    found = []
    with doing("weighing the sampler's steps") as stage:
        for index in range(length):
            stage(index, length)
            moved, error = _roll(task, sampler, teacher, student, samples, seed, index)
            change = (moved - plain).flatten(1).norm(dim=1)
            found.append(float((change / error.clamp_min(1e-12)).median()))
    mean = sum(found) / length
    return tuple(min(_MOST, max(_LEAST, one / mean)) if mean > 0 else 1.0 for one in found)


def _roll(
    task: Task, sampler: Sampler, teacher: Denoise, student: Denoise, samples: int, seed: int, at: int | None
) -> tuple[Tensor, Tensor]:
    """The end of the trajectory with the student at one step, and its error of the guided noise there [N]."""
    scheduler = task.scheduler(sampler.num_inference_steps)
    noise, conditions = start(task, samples, generator(seed, 0, 0))
    sample, error = initial_sample(task, scheduler, noise), torch.zeros(samples)
    for index, timestep in enumerate(scheduler.timesteps):
        model_input = scaled_input(task, scheduler, sample, timestep)
        asked = (model_input, float(timestep) * task.time_scale, conditions, sampler.guidance_scale)
        found = guided(teacher, *asked)
        if index == at:
            replaced = guided(student, *asked)
            error, found = (replaced - found).flatten(1).norm(dim=1), replaced
        sample = advance(scheduler, found, timestep, sample, sampler.eta, generator(seed, 0, index + 1))
    return sample, error
