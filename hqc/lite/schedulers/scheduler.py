"""What the schedulers have in common: what they are asked, their timesteps, the image that an output predicts."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hqc.errors import EvaluationError
from hqc.lite.arrays import Floats
from hqc.lite.schedulers.settings import Settings

__all__ = ["Scheduler", "Step", "check_timesteps", "spaced", "to_predicted"]


class Step(NamedTuple):
    """What a step gives: the sample of the next one, and the image that the denoiser's output predicts (x₀)."""

    sample: Floats
    predicted: Floats


class Scheduler(Protocol):
    """One number of steps of a sampler."""

    @property
    def timesteps(self) -> NDArray[Any]:
        """What the denoiser is given at every step."""
        ...

    @property
    def init_noise_sigma(self) -> np.float32:
        """What the noise at the start is multiplied by."""
        ...

    @property
    def draws_noise(self) -> bool:
        """Whether every step needs noise of its own."""
        ...

    def scaled(self, x: Floats, i: int) -> Floats:
        """The sample as the denoiser takes it at step i."""
        ...

    def predicted(self, output: Floats, i: int, x: Floats) -> Floats:
        """The image that the denoiser's output at step i predicts, before any other."""
        ...

    def step(
        self, output: Floats, i: int, x: Floats, noise: Floats | None = None, before: Floats | None = None
    ) -> Step:
        """One step. noise: where it is drawn. before: what the last step predicted, None at the first."""
        ...


def spaced(settings: Settings, steps: int, last: int | None = None, *, ends: bool = False) -> NDArray[np.float64]:
    """Timesteps from the largest down, spaced as the configuration says (table 2 of arXiv:2305.08891).

    last: one above the largest, where it is not the number of training. ends: whether a further one, below the last
    step's, ends them, as DPM-Solver counts. Not rounded where they are spaced evenly.
    """
    last, count = last or settings.num_train_timesteps, steps + int(ends)
    if settings.timestep_spacing == "linspace":
        return np.asarray(np.linspace(0, last - 1, count)[::-1][:steps], np.float64)
    if settings.timestep_spacing == "leading":
        return np.asarray((np.arange(count) * (last // count))[::-1][:steps] + settings.steps_offset, np.float64)
    return np.asarray(np.arange(last, 0, -settings.num_train_timesteps / steps).round() - 1, np.float64)


def check_timesteps(timesteps: NDArray[Any], settings: Settings) -> None:
    """Refuses timesteps beyond training, or with the first twice: diffusers then begins at the second.

    Raises:
        EvaluationError: saying so.
    """
    steps = len(timesteps)
    if timesteps.max() >= settings.num_train_timesteps:
        largest = f"would begin at {timesteps.max():g} of {settings.num_train_timesteps} timesteps"
        raise EvaluationError(f"{steps} steps", largest, "Ask for fewer.")
    if steps > 1 and timesteps[0] == timesteps[1]:
        raise EvaluationError(f"{steps} steps", f"begin twice at timestep {timesteps[0]:g}", "Ask for fewer.")


def to_predicted(kind: str, output: Floats, x: Floats, alpha: np.float32, sigma: np.float32) -> Floats:
    """x₀ from what a denoiser predicts of x = α·x₀ + σ·ε."""
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return np.asarray(alpha * x - sigma * output)
    return np.asarray((x - sigma * output) / alpha)
