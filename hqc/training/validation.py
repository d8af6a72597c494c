"""A held-out trajectory of the teacher: how far the student is from it, step by step, while it learns."""

import torch

from hqc.sampling import Sampler, Task, Validation, guided
from hqc.sampling.task import Denoise
from hqc.training.trajectories import walk

__all__ = ["HeldOut"]

_SEED = 7_777_777
"""Far from what training draws from."""


class HeldOut:
    """One trajectory of the teacher, computed once."""

    def __init__(self, task: Task, sampler: Sampler, teacher: Denoise, batch_size: int) -> None:
        self._states = tuple(walk(task, sampler, teacher, batch_size=batch_size, seed=_SEED, epoch=0))
        self._guidance = sampler.guidance_scale

    @torch.no_grad()
    def measure(self, student: Denoise, step: int) -> Validation:
        """The student there."""
        errors, gains = [], []
        for state in self._states:
            found = guided(student, state.sample, state.time_input, state.conditions, self._guidance)
            energy = float(state.wanted.square().sum())
            errors.append(float((found - state.wanted).square().sum()) / energy)
            gains.append(float((found * state.wanted).sum()) / energy)
        return Validation(step, tuple(state.timestep for state in self._states), tuple(errors), tuple(gains))
