"""DPM-Solver++ (arXiv:2211.01095) of order 1 and 2, as diffusers' DPMSolverMultistepScheduler."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hqc.lite.arrays import Floats
from hqc.lite.schedulers.betas import alphas_cumprod
from hqc.lite.schedulers.scheduler import Step, check_timesteps, spaced, to_predicted
from hqc.lite.schedulers.settings import Settings
from hqc.lite.schedulers.sigmas import levels

__all__ = ["DpmSolver"]

_ONE, _HALF = np.float32(1), np.float32(0.5)
_FEW_STEPS = 15  # below this the last step is of order 1


@dataclass(frozen=True)
class DpmSolver:
    """α, σ and λ = log α - log σ of every step and of the end."""

    timesteps: NDArray[np.int64]
    alphas: Floats
    sigmas: Floats
    lambdas: Floats
    settings: Settings
    init_noise_sigma: np.float32 = _ONE

    @classmethod
    def of(cls, settings: Settings, steps: int) -> "DpmSolver":
        """DPM-Solver++ in a number of steps."""
        even = spaced(settings, steps, _last(settings), ends=True).round()
        check_timesteps(even, settings)
        replaced = settings.use_karras_sigmas or settings.use_exponential_sigmas
        ends = np.array([settings.num_train_timesteps - 1, 0], np.float64)  # of all of training, unlike Euler's
        ratios, timesteps = levels(settings, ends if replaced else even, steps)
        if settings.use_karras_sigmas and settings.beta_schedule != "squaredcos_cap_v2":
            timesteps = timesteps.round()
        alphas: Floats = np.reciprocal(np.sqrt(np.square(ratios) + _ONE))
        sigmas: Floats = np.multiply(ratios, alphas)
        with np.errstate(divide="ignore"):  # no noise is left at the end: λ is infinite
            lambdas = np.log(alphas) - np.log(sigmas)
        whole = timesteps.astype(np.int64)
        check_timesteps(whole, settings)
        return cls(whole, alphas, sigmas, lambdas, settings)

    @property
    def draws_noise(self) -> bool:
        """Never."""
        return False

    def scaled(self, x: Floats, i: int) -> Floats:
        """The sample itself."""
        return x

    def predicted(self, output: Floats, i: int, x: Floats) -> Floats:
        """x₀ that the output of step i predicts."""
        return to_predicted(self.settings.prediction_type, output, x, self.alphas[i], self.sigmas[i])

    def step(
        self, output: Floats, i: int, x: Floats, noise: Floats | None = None, before: Floats | None = None
    ) -> Step:
        """x of the next step, from what this step and the one before it predict."""
        predicted = self.predicted(output, i, x)
        width = self.lambdas[i + 1] - self.lambdas[i]
        fall = np.exp(-width) - _ONE
        gain = self.alphas[i + 1]
        first = (self.sigmas[i + 1] / self.sigmas[i]) * x - (gain * fall) * predicted
        if before is None or width == 0 or self._of_order_1(i):
            return Step(first, predicted)
        ratio = (self.lambdas[i] - self.lambdas[i - 1]) / width
        slope = (_ONE / ratio) * (predicted - before)
        if self.settings.solver_type == "midpoint":
            return Step(first - _HALF * (gain * fall) * slope, predicted)
        return Step(first + (gain * (fall / width + _ONE)) * slope, predicted)

    def _of_order_1(self, i: int) -> bool:
        if self.settings.solver_order == 1:
            return True
        few = self.settings.lower_order_final and len(self.timesteps) < _FEW_STEPS
        to_zero = self.settings.final_sigmas_type == "zero"
        return i == len(self.timesteps) - 1 and (self.settings.euler_at_final or few or to_zero)


def _last(settings: Settings) -> int:
    """One above the largest timestep that is not clipped for its λ."""
    left = alphas_cumprod(settings, above_zero=True)
    with np.errstate(divide="ignore"):
        lambdas = np.log(np.sqrt(left)) - np.log(np.sqrt(_ONE - left))
    clipped = int(np.searchsorted(lambdas[::-1], settings.lambda_min_clipped))
    return settings.num_train_timesteps - clipped
