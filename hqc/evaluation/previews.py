"""What an image will look like, from a step on the way: x_0 as a scheduler's step implies it, decoded."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hqc.errors import TrainingError
from hqc.sampling.image_gain import image_of
from hqc.sampling.task import noise_only

__all__ = ["can_preview", "decoded", "predicted", "watch_steps"]


def watch_steps(scheduler: Any, see: Callable[[float, Tensor, Tensor], None]) -> None:
    """Makes a scheduler's `step` tell (timestep, x_t, the denoiser's output) before it steps.

    Its signature stays as it was: pipelines look there for what a scheduler takes.
    """
    step = scheduler.step

    @functools.wraps(step)
    def watched(model_output: Tensor, timestep: Any, sample: Tensor, *more: Any, **options: Any) -> Any:
        see(float(timestep), sample, model_output)
        return step(model_output, timestep, sample, *more, **options)

    scheduler.step = watched


def can_preview(scheduler: Any) -> bool:
    """Whether `predicted` knows the schedulers of this class."""
    return _flow(scheduler) or hasattr(scheduler, "alphas_cumprod")


def predicted(scheduler: Any, timestep: float, sample: Tensor, output: Tensor) -> Tensor:
    """x_0 that an output stands for, of the x_t that a scheduler is about to step from.

    With ε: (x_t - √(1-ᾱ)·ε)/√ᾱ, of Karras' schedulers with x_t/√(σ²+1); flow matching: x_t - σ·v. [N, …] -> [N, …].

    Raises:
        TrainingError: for a scheduler that tells no noise levels (`can_preview`).
    """
    output = noise_only(output, sample)
    if _flow(scheduler):
        return sample - timestep / float(scheduler.config.num_train_timesteps) * output
    if not hasattr(scheduler, "alphas_cumprod"):
        raise TrainingError(type(scheduler).__name__, "tells no noise levels", "Ask for no previews.")
    scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
    return image_of(scheduler, timestep, scaled, output)


def _flow(scheduler: Any) -> bool:
    return "FlowMatch" in type(scheduler).__name__


@torch.no_grad()
def decoded(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [N, C, H, W] in [0, 1] of a pipeline's latents, as its own call decodes them; pixels are their own.

    size: width and height of the images, px, which packed latents [N, L, 4·C] do not tell.
    """
    autoencoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if autoencoder is None:
        return (latents.float() / 2 + 0.5).clamp(0, 1)
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, size[1], size[0], pipe.vae_scale_factor)
    scaled = _unscaled(autoencoder.config, latents).to(autoencoder.dtype)
    images: Tensor = autoencoder.decode(scaled, return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _unscaled(config: Any, latents: Tensor) -> Tensor:
    """What the decoder takes: (z/scale)·std + mean + shift, each where the autoencoder has one."""
    latents = latents / config.scaling_factor
    for name, combine in (("latents_std", torch.mul), ("latents_mean", torch.add)):
        if (values := getattr(config, name, None)) is not None:
            latents = combine(latents, torch.tensor(values).view(1, -1, 1, 1).to(latents))
    shift = getattr(config, "shift_factor", None)
    return latents if shift is None else latents + shift
