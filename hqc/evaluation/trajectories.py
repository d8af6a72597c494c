"""A sampler's run seen step by step: the guided ε and the latents; free, or along another model's run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hqc.errors import EvaluationError
from hqc.evaluation.sampling import SamplingPipeline, sample_images
from hqc.evaluation.scheduler_steps import changed_steps

__all__ = ["Trajectory", "latent_cosines", "record"]


@dataclass(frozen=True)
class Trajectory:
    """What one batch went through, step by step.

    timesteps: the scheduler's, in the order of sampling. noise: what the denoiser predicts, guided, without a learned
    variance [N, …] (ε, or v or a velocity where the scheduler is of such a model). latents: x after each step [N, …].
    """

    timesteps: tuple[float, ...]
    noise: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]


def record(
    pipe: SamplingPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    along: Trajectory | None = None,
    **sampler: Any,
) -> Trajectory:
    """Samples one batch and keeps what its scheduler was given and gave.

    along: x_t of this trajectory is put in the place of the pipeline's own after every step, so that the denoiser is
    asked at the same points; `noise` is still its own. sampler: as for `sample_images`, without a batch size.

    Raises:
        EvaluationError: see `sample_images`; or where `along` has other steps or sizes.
    """
    timesteps, noise, latents = list[float](), list[Tensor](), list[Tensor]()

    def keep_noise(timestep: float, predicted: Tensor) -> Tensor:
        timesteps.append(timestep)
        noise.append(_kept(predicted))
        return predicted

    def keep_latents(x: Tensor) -> Tensor:
        if along is not None:
            _check_along(along, timesteps, x)
            x = along.latents[len(latents)].to(x)
        latents.append(_kept(x))
        return x

    with changed_steps(pipe.scheduler, noise=keep_noise, latents=keep_latents):
        sample_images(pipe, labels, seeds, batch_size=len(labels), **sampler)
    found = Trajectory(tuple(timesteps), tuple(noise), tuple(latents))
    if along is not None and found.timesteps != along.timesteps:
        raise _differs(f"{len(found.timesteps)} steps, the reference {len(along.timesteps)}")
    return found


def latent_cosines(found: Trajectory, reference: Trajectory) -> Tensor:
    """⟨x, x'⟩ / (‖x‖·‖x'‖) after each step, image by image: [steps, N], float64.

    Raises:
        EvaluationError: if the trajectories have other steps or sizes.
    """
    if found.timesteps != reference.timesteps:
        raise _differs("other timesteps than the reference")
    pairs = zip(found.latents, reference.latents, strict=True)
    return torch.stack([cosine_similarity(a.double().flatten(1), b.double().flatten(1)) for a, b in pairs])


def _kept(x: Tensor) -> Tensor:
    return x.detach().float().cpu().clone()


def _check_along(along: Trajectory, timesteps: Sequence[float], x: Tensor) -> None:
    number = len(timesteps) - 1
    if number >= len(along.timesteps) or timesteps[number] != along.timesteps[number]:
        raise _differs(f"step {number + 1} at timestep {timesteps[number]:g}")
    if along.latents[number].shape != x.shape:
        raise _differs(f"latents {list(x.shape)}, the reference {list(along.latents[number].shape)}")


def _differs(found: str) -> EvaluationError:
    return EvaluationError("trajectory", f"does not pair up with the reference's: {found}", "Sample both models alike.")
