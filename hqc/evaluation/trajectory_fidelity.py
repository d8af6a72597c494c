"""How a model follows the float model through the sampler: the gain of its ε, and its latents step by step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.gain import Gain, gain_of, noise_products
from hqc.evaluation.sampling import SamplingPipeline, describe_seeds
from hqc.evaluation.trajectories import latent_cosines, record

__all__ = ["USUAL_COSINE", "TrajectoryFidelity", "trajectory_fidelity"]

USUAL_COSINE = 0.95
"""A mean latent cosine that is often asked for."""

RUNS = 3  # of each image: the reference, the model along it, the model by itself


@dataclass(frozen=True)
class TrajectoryFidelity:
    """What a model does along the sampler against the float model, from the same noise and conditions.

    Args:
        gain: of the guided ε, on the float model's own trajectory.
        cosine_by_timestep: mean over the images of the cosine of x with the float model's x *after* the step at each
            of `gain.timesteps`; both models run freely, so the last one is of the final latents.
        num_images: images that this was measured on.
        seeds: theirs, in a few characters.
    """

    gain: Gain
    cosine_by_timestep: tuple[float, ...]
    num_images: int
    seeds: str

    @property
    def mean_cosine(self) -> float:
        """Mean over the steps."""
        return sum(self.cosine_by_timestep) / len(self.cosine_by_timestep)

    @property
    def least_cosine(self) -> float:
        """Of the worst step."""
        return min(self.cosine_by_timestep)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the lists are by timestep, in the order of sampling, and an undefined gain is null."""
        return {
            "num_images": self.num_images,
            "seeds": self.seeds,
            "gain": _defined(self.gain.overall),
            "latent_cosine_mean": self.mean_cosine,
            "latent_cosine_least": self.least_cosine,
            "timesteps": list(self.gain.timesteps),
            "gain_by_timestep": [_defined(k) for k in self.gain.by_timestep],
            "latent_cosine_by_timestep": list(self.cosine_by_timestep),
        }


def trajectory_fidelity(
    pipe: SamplingPipeline,
    reference: SamplingPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **sampler: Any,
) -> TrajectoryFidelity:
    """Runs each image three times: the reference, the model along the reference's x_t, the model by itself.

    Args:
        pipe: the model's pipeline. reference: the float model's, with the same scheduler.
        labels: as for `sample_images`. seeds: as many.
        batch_size: images at once; the memory that is kept is that of one batch's latents.
        progress: called with (runs done, 3·N) after every run.
        sampler: num_inference_steps, guidance_scale, eta, prompts, negative_prompt of `sample_images`.

    Raises:
        EvaluationError, TrainingError: see `sample_images` and `record`.
    """
    if not labels or len(labels) != len(seeds) or batch_size < 1:
        found = f"{len(labels)} labels, {len(seeds)} seeds, batch_size={batch_size}"
        raise EvaluationError(
            "trajectory", f"found {found}; expected as many, at least one", "Correct these arguments."
        )
    products: list[Tensor] = []
    cosines: list[Tensor] = []
    timesteps: tuple[float, ...] = ()
    done, total = 0, RUNS * len(labels)

    def ran(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for first in range(0, len(labels), batch_size):
        asked = labels[first : first + batch_size], seeds[first : first + batch_size]
        wanted = record(reference, *asked, **sampler)
        ran(len(asked[0]))
        followed = record(pipe, *asked, along=wanted, **sampler)
        ran(len(asked[0]))
        free = record(pipe, *asked, **sampler)
        ran(len(asked[0]))
        timesteps = wanted.timesteps
        products.append(noise_products(followed.noise, wanted.noise))
        cosines.append(latent_cosines(free, wanted))
    return TrajectoryFidelity(
        gain_of(timesteps, torch.stack(products).sum(0)),
        tuple(torch.cat(cosines, dim=1).mean(1).tolist()),
        len(labels),
        describe_seeds(seeds),
    )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
