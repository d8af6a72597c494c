"""DDIM (arXiv:2010.02502), as diffusers' DDIMScheduler."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hqc.lite.arrays import Floats
from hqc.lite.schedulers.betas import alphas_cumprod
from hqc.lite.schedulers.scheduler import Step, check_timesteps, spaced, to_predicted
from hqc.lite.schedulers.settings import Settings

__all__ = ["Ddim"]

_ONE = np.float32(1)


@dataclass(frozen=True)
class Ddim:
    """ᾱ of every step and of the one after it. eta: how much noise every step draws, 0: none."""

    timesteps: NDArray[np.int64]
    left: Floats
    left_after: Floats
    eta: float
    settings: Settings
    init_noise_sigma: np.float32 = _ONE

    @classmethod
    def of(cls, settings: Settings, steps: int, eta: float) -> "Ddim":
        """DDIM in a number of steps."""
        timesteps = spaced(settings, steps).round().astype(np.int64)
        check_timesteps(timesteps, settings)
        left = alphas_cumprod(settings)
        after = timesteps - settings.num_train_timesteps // steps
        final = _ONE if settings.set_alpha_to_one else left[0]
        return cls(timesteps, left[timesteps], np.where(after >= 0, left[after], final), eta, settings)

    @property
    def draws_noise(self) -> bool:
        """Whether every step needs noise of its own."""
        return self.eta > 0

    def scaled(self, x: Floats, i: int) -> Floats:
        """The sample itself."""
        return x

    def predicted(self, output: Floats, i: int, x: Floats) -> Floats:
        """x₀ that the output of step i predicts, clipped where the configuration says so."""
        alpha, sigma = np.sqrt(self.left[i]), np.sqrt(_ONE - self.left[i])
        with np.errstate(divide="ignore", invalid="ignore"):  # nothing of the image may be left
            found = to_predicted(self.settings.prediction_type, output, x, alpha, sigma)
        bound = np.float32(self.settings.clip_sample_range)
        return np.clip(found, -bound, bound) if self.settings.clip_sample else found

    def step(
        self, output: Floats, i: int, x: Floats, noise: Floats | None = None, before: Floats | None = None
    ) -> Step:
        """x of the next step: what is left of x₀, the direction back to x, and noise."""
        left, after = self.left[i], self.left_after[i]
        predicted = self.predicted(output, i, x)
        variance = ((_ONE - after) / (_ONE - left)) * (_ONE - left / after)
        deviation = np.float32(self.eta) * np.sqrt(variance)
        # With all of the noise drawn anew nothing is left to go on, and rounding may make that less than nothing.
        rest = np.maximum(_ONE - after - np.square(deviation), np.float32(0))
        direction = np.sqrt(rest) * self._epsilon(output, i, x)
        following = np.sqrt(after) * predicted + direction
        return Step(following if noise is None else following + deviation * noise, predicted)

    def _epsilon(self, output: Floats, i: int, x: Floats) -> Floats:
        """The noise in x, as the output says; not of the clipped x₀."""
        alpha, sigma = np.sqrt(self.left[i]), np.sqrt(_ONE - self.left[i])
        if self.settings.prediction_type == "sample":
            return np.asarray((x - alpha * output) / sigma)
        if self.settings.prediction_type == "v_prediction":
            return np.asarray(alpha * output + sigma * x)
        return output
