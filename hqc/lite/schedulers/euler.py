"""Euler's method on the probability flow (algorithm 2 of arXiv:2206.00364), as diffusers' EulerDiscreteScheduler."""

from dataclasses import dataclass

import numpy as np

from hqc.lite.arrays import Floats
from hqc.lite.schedulers.scheduler import Step, check_timesteps, spaced
from hqc.lite.schedulers.settings import Settings
from hqc.lite.schedulers.sigmas import levels

__all__ = ["Euler"]

_ONE = np.float32(1)


@dataclass(frozen=True)
class Euler:
    """Levels σ of every step and of the end."""

    timesteps: Floats
    sigmas: Floats
    settings: Settings

    @classmethod
    def of(cls, settings: Settings, steps: int) -> "Euler":
        """Euler's method in a number of steps."""
        # diffusers rounds evenly spaced timesteps to float32 before it looks their levels up.
        even = spaced(settings, steps).astype(np.float32)
        check_timesteps(even, settings)
        sigmas, timesteps = levels(settings, even.astype(np.float64), steps)
        return cls(timesteps.astype(np.float32), sigmas, settings)

    @property
    def init_noise_sigma(self) -> np.float32:
        """The first level, or that of image and noise together where the steps begin below the last timestep."""
        largest = self.sigmas.max()
        root = np.sqrt(np.square(largest) + _ONE)
        return np.float32(root if self.settings.timestep_spacing == "leading" else largest)

    @property
    def draws_noise(self) -> bool:
        """Never."""
        return False

    def scaled(self, x: Floats, i: int) -> Floats:
        """The sample with variance 1."""
        return np.asarray(x / np.sqrt(np.square(self.sigmas[i]) + _ONE))

    def predicted(self, output: Floats, i: int, x: Floats) -> Floats:
        """x₀ that the output of step i predicts."""
        sigma = self.sigmas[i]
        if self.settings.prediction_type == "sample":
            return output
        if self.settings.prediction_type == "epsilon":
            return np.asarray(x - sigma * output)
        whole = np.square(sigma) + _ONE
        return np.asarray(output * (-sigma / np.sqrt(whole)) + x / whole)

    def step(
        self, output: Floats, i: int, x: Floats, noise: Floats | None = None, before: Floats | None = None
    ) -> Step:
        """x at the next level, along the straight line from x₀."""
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        predicted = self.predicted(output, i, x)
        return Step(x + ((x - predicted) / sigma) * (following - sigma), predicted)
