"""The gain of a model's ε̂ over the float model's ε, k = Σ⟨ε̂, ε⟩ / Σ⟨ε, ε⟩; and sampling with it taken out.

k is the least-squares scale: ε̂ = k·ε + what is orthogonal to ε. Quantisation adds the second and may change the first.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.sampling import SamplingPipeline
from hqc.evaluation.scheduler_steps import changed_steps

__all__ = ["Gain", "at_gain_one", "gain_of", "noise_products"]

LEAST_DIVISOR = 0.1
"""ε̂ that follows ε less than this is noise; divided by its gain it would grow tenfold a step and more."""


@dataclass(frozen=True)
class Gain:
    """k by timestep, in the order of sampling, and over all steps; NaN where the float model's ε is 0."""

    timesteps: tuple[float, ...]
    by_timestep: tuple[float, ...]
    overall: float

    @property
    def divides(self) -> bool:
        """Whether ε̂ can be divided by it and sampled with."""
        return all(k >= LEAST_DIVISOR for k in self.by_timestep)

    def check_divides(self) -> None:
        """Refuses a gain that does not divide.

        Raises:
            EvaluationError: naming the timestep of the least k, if that is below a tenth or undefined.
        """
        if self.divides:
            return
        least = min(self.by_timestep, key=lambda k: -math.inf if math.isnan(k) else k)
        timestep = self.timesteps[self.by_timestep.index(least)]
        raise EvaluationError(
            "gain 1",
            f"the gain is {least:.3g} at timestep {timestep:g}, expected {LEAST_DIVISOR:g} or more",
            "The model does not follow the float model: leave the figures at gain 1 out.",
        )


def noise_products(found: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """(Σ⟨ε̂, ε⟩, Σ⟨ε, ε⟩) of each step over all images of a batch, [steps, 2], float64. Batches add up."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, reference, strict=True)]
    return torch.stack([torch.stack([(a * b).sum(), (b * b).sum()]) for a, b in pairs])


def gain_of(timesteps: Sequence[float], products: Tensor) -> Gain:
    """k from the sums of `noise_products`, [steps, 2]."""
    by_timestep = tuple(_ratio(*row) for row in products.tolist())
    return Gain(tuple(timesteps), by_timestep, _ratio(*products.sum(0).tolist()))


def _ratio(product: float, square: float) -> float:
    return product / square if square > 0 else math.nan


@contextmanager
def at_gain_one(pipe: SamplingPipeline, gain: Gain) -> Iterator[None]:
    """While inside, the pipeline's scheduler is given ε̂/k of the step; every call of the pipeline has the gain's steps.

    Raises:
        EvaluationError: if the gain cannot be divided by, or the pipeline makes other steps.
    """
    gain.check_divides()
    calls = 0

    def divided(timestep: float, predicted: Tensor) -> Tensor:
        nonlocal calls
        number = calls % len(gain.timesteps)
        calls += 1
        if timestep != gain.timesteps[number]:
            raise EvaluationError(
                "gain 1",
                f"step {number + 1} is at timestep {timestep:g}, the gain's at {gain.timesteps[number]:g}",
                "Measure the gain with the same sampler and steps.",
            )
        return predicted / gain.by_timestep[number]

    with changed_steps(pipe.scheduler, noise=divided):
        yield
