"""What an error of the noise costs at each step of the sampler, measured on the calibrated student.

    w_t ∝ median over images of ‖x_0(student at t alone) - x_0‖ / ‖ε̂_t - ε_t‖,   mean 1, within [0.05, 10]

x_0(student at t alone) is where the sampler ends when the student replaces the teacher in that one step. The summed
error of ε weighs late steps most, which hardly move the image. Source: own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqc.sampling import Sampler, Task, guided
from hqc.sampling.task import Conditions, Denoise, advance, initial_sample, scaled_input, start
from hqc.stages import doing
from hqc.training.trajectories import generator

__all__ = ["step_weights"]

_LEAST, _MOST = 0.05, 10.0


@torch.no_grad()
def step_weights(
    task: Task, sampler: Sampler, teacher: Denoise, student: Denoise, *, samples: int, seed: int
) -> tuple[float, ...]:
    """One weight a step of the schedule, mean 1 before the bounds.

    Before the step that is replaced all is as without it: only what follows is computed again.
    """
    plain, states = _rolled(task, sampler, teacher, samples, seed, ())
    found = []
    with doing("weighing the sampler's steps") as stage:
        for index, state in enumerate(states):
            stage(index, len(states))
            replaced = guided(student, *state.asked)
            known = [*(earlier.noise for earlier in states[:index]), replaced]
            moved, _ = _rolled(task, sampler, teacher, samples, seed, known)
            change, error = ((a - b).flatten(1).norm(dim=1) for a, b in ((moved, plain), (replaced, state.noise)))
            found.append(float((change / error.clamp_min(1e-12)).median()))
    mean = sum(found) / len(found)
    return tuple(min(_MOST, max(_LEAST, one / mean)) if mean > 0 else 1.0 for one in found)


class _Step(NamedTuple):
    """What the denoiser is asked at one step, besides itself, and the guided noise there."""

    asked: tuple[Tensor, float, Conditions | None, float]
    noise: Tensor


def _rolled(
    task: Task, sampler: Sampler, denoise: Denoise, samples: int, seed: int, known: Sequence[Tensor]
) -> tuple[Tensor, list[_Step]]:
    """The end of one trajectory, and its steps. known: the noise of the first of them, instead of the denoiser's."""
    scheduler = task.scheduler(sampler.num_inference_steps)
    start_noise, conditions = start(task, samples, generator(seed, 0, 0))
    sample, steps = initial_sample(task, scheduler, start_noise), list[_Step]()
    for index, timestep in enumerate(scheduler.timesteps):
        model_input = scaled_input(task, scheduler, sample, timestep)
        asked = (model_input, float(timestep) * task.time_scale, conditions, sampler.guidance_scale)
        noise = known[index] if index < len(known) else guided(denoise, *asked)
        steps.append(_Step(asked, noise))
        sample = advance(scheduler, noise, timestep, sample, sampler.eta, generator(seed, 0, index + 1))
    return sample, steps
