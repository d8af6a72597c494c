"""How far an error of a denoiser's output moves the image that it stands for, by timestep."""

import math
from typing import Any

from torch import Tensor

from hqc.errors import TrainingError
from hqc.sampling.one_call import OneCall

__all__ = ["image_gain", "image_of"]


def image_gain(scheduler: Any, timestep: float) -> float:
    """k = ‖∂x_0/∂output‖ at one of a scheduler's timesteps.

    ε-prediction √((1-ᾱ)/ᾱ), v-prediction √(1-ᾱ), flow matching σ = t/1000; 1 where the output is the image: of
    x_0-prediction, and of programs that no scheduler runs.

    Raises:
        TrainingError: for a scheduler without noise levels, or where the output says nothing of the image.
    """
    config, alphas = scheduler.config, getattr(scheduler, "alphas_cumprod", None)
    prediction = config.get("prediction_type", "epsilon")
    if prediction == "sample" or (isinstance(scheduler, OneCall) and alphas is None and not config):
        return 1.0
    where = f"in_image_space at timestep {timestep:g}"
    if alphas is None:
        if "FlowMatch" in scheduler_name(scheduler):
            return timestep / float(config.get("num_train_timesteps", 1000))
        raise TrainingError(where, f"{scheduler_name(scheduler)} tells no noise levels", "Take guided_noise instead.")
    if not 0 <= round(timestep) < len(alphas):
        raise TrainingError(where, f"the model was trained on timesteps 0…{len(alphas) - 1}", "Give one of these.")
    signal = float(alphas[round(timestep)])
    if prediction == "v_prediction":
        return math.sqrt(1 - signal)
    if signal <= 0:
        raise TrainingError(where, "x_t holds no image there, so that ε tells none", "Take guided_noise instead.")
    return math.sqrt((1 - signal) / signal)


def scheduler_name(scheduler: Any) -> str:
    """Of the class of a scheduler, or of the one that a single call stands in for."""
    return scheduler.around if isinstance(scheduler, OneCall) else type(scheduler).__name__


def image_of(scheduler: Any, timestep: float, sample: Tensor, output: Tensor) -> Tensor:
    """x_0 that a denoiser's output stands for at a timestep, of the x_t that it was given; see `image_gain`.

    Raises:
        TrainingError: as `image_gain` does, and for flow matching.
    """
    gain, prediction = image_gain(scheduler, timestep), scheduler.config.get("prediction_type", "epsilon")
    if prediction == "sample":
        return output
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        name = scheduler_name(scheduler)
        raise TrainingError(f"timestep {timestep:g}", f"{name} tells no noise levels", "Take one that adds noise by ᾱ.")
    signal = float(alphas[round(timestep)])
    scale = math.sqrt(signal) if prediction == "v_prediction" else 1 / math.sqrt(signal)
    return scale * sample - gain * output
