"""Images from a pipeline where each image depends on its own seed and label only."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.training.task import require_steps

__all__ = ["MAX_SEED", "Samples", "SamplingPipeline", "SamplingProtocol", "describe_seeds", "sample_images"]

MAX_SEED = 2**63 - 1


class SamplingPipeline(Protocol):
    """What is asked of a pipeline: `ClassConditionalLDMPipeline` and anything called like it."""

    unet: Any
    vae: Any
    scheduler: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class SamplingProtocol:
    """How images were sampled; two sets of images are comparable only if these are equal.

    Args:
        sampler: class name of the scheduler.
        num_inference_steps: denoising steps an image.
        guidance_scale: classifier-free guidance; 1 is none, and stands for everything below.
        eta: noise of DDIM, 0 (deterministic) to 1.
    """

    sampler: str
    num_inference_steps: int
    guidance_scale: float
    eta: float

    def describe(self) -> str:
        """One line, ASCII only, for titles and footnotes."""
        return f"{self.sampler}, {self.num_inference_steps} steps, guidance {self.guidance_scale:g}, eta {self.eta:g}"


@dataclass(frozen=True)
class Samples:
    """Images and the latents they were decoded from, in one order with their labels and seeds.

    Args:
        images: `[N, C, H, W]`, float32 in [0, 1].
        latents: `[N, c, h, w]`, float32, as the sampler left them (the VAE takes them / scaling factor).
        labels: N classes.
        seeds: N seeds.
        protocol: how they were sampled.

    Raises:
        EvaluationError: the four lengths differ, a tensor is not 4-D, or a pixel is not in [0, 1].
    """

    images: Tensor
    latents: Tensor
    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    protocol: SamplingProtocol

    def __post_init__(self) -> None:
        lengths = {len(self.images), len(self.latents), len(self.labels), len(self.seeds)}
        if len(lengths) != 1 or self.images.ndim != 4 or self.latents.ndim != 4:
            raise EvaluationError(
                "Samples",
                f"images {list(self.images.shape)}, latents {list(self.latents.shape)}, "
                f"{len(self.labels)} labels and {len(self.seeds)} seeds; expected [N, C, H, W] and N of each",
                "Build Samples with sample_images.",
            )
        if not bool(((self.images >= 0) & (self.images <= 1)).all()):
            raise EvaluationError("Samples", "a pixel is not in [0, 1]", "Clamp the images first.")

    def __len__(self) -> int:
        return len(self.labels)


def sample_images(
    pipe: SamplingPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    eta: float,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Sample one image per (label, seed) and keep its latent from the same run.

    Image i draws all of its noise from `torch.Generator("cpu").manual_seed(seeds[i])`, so it depends on its
    seed and label and not on its neighbours; another `batch_size` changes it by float rounding at most.

    Args:
        pipe: the pipeline; its `unet` may be an integer runtime.
        labels: N classes.
        seeds: N seeds in 0…2⁶³−1.
        num_inference_steps: denoising steps, at least 1.
        guidance_scale: classifier-free guidance, at least 0; none up to 1.
        eta: noise of DDIM, 0…1.
        batch_size: images a call of the pipeline, at least 1.
        progress: called with (images done, N) after every batch.

    Raises:
        EvaluationError: lengths that differ, values out of range, or a model that gives non-finite images.
    """
    _check_request(labels, seeds, num_inference_steps, guidance_scale, eta, batch_size)
    if hasattr(pipe.scheduler, "set_timesteps"):
        require_steps(pipe.scheduler, num_inference_steps)
    images, latents = [], []
    with torch.inference_mode(), _quiet(pipe):
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            latent = _sample_latents(pipe, labels[part], seeds[part], num_inference_steps, guidance_scale, eta)
            images.append(_decode(pipe, latent).float().cpu())
            latents.append(latent.float().cpu())
            if progress is not None:
                progress(min(start + batch_size, len(labels)), len(labels))
    guidance = 1.0 if _unconditional(pipe) else max(1.0, guidance_scale)
    protocol = SamplingProtocol(type(pipe.scheduler).__name__, num_inference_steps, guidance, eta)
    all_images = torch.cat(images)  # outside inference mode: ordinary tensors
    _check_finite(all_images, labels, seeds)
    return Samples(all_images, torch.cat(latents), tuple(labels), tuple(seeds), protocol)


def describe_seeds(seeds: Sequence[int]) -> str:
    """Seeds in a few characters: `0..99` when consecutive, up to eight in full, else a digest.

    >>> describe_seeds([5, 6, 7]), describe_seeds([4, 2])
    ('5..7', '4, 2')
    """
    first, last = seeds[0], seeds[-1]
    if len(seeds) > 1 and list(seeds) == list(range(first, first + len(seeds))):
        return f"{first}..{last}"
    if len(seeds) <= 8:
        return ", ".join(map(str, seeds))
    digest = hashlib.sha256(",".join(map(str, seeds)).encode()).hexdigest()[:12]
    return f"{len(seeds)} seeds, sha256 {digest}"


def _sample_latents(
    pipe: SamplingPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    eta: float,
) -> Tensor:
    condition: dict[str, Any] = {"class_labels": list(labels), "guidance_scale": guidance_scale}
    output = pipe(
        **({"batch_size": len(labels)} if _unconditional(pipe) else condition),
        num_inference_steps=num_inference_steps,
        eta=eta,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="latent",
        return_dict=False,
    )
    latents: Tensor = output[0]
    return latents


def _unconditional(pipe: SamplingPipeline) -> bool:
    """Whether the labels only count images: the pipeline takes neither a class nor a guidance scale."""
    from hqc.models.ldm import UnconditionalLDMPipeline

    return isinstance(pipe, UnconditionalLDMPipeline)


def _decode(pipe: SamplingPipeline, latents: Tensor) -> Tensor:
    """Images `[N, C, H, W]` in [0, 1] from sampler latents `[N, c, h, w]`, like the pipeline's "pt"."""
    scaled = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    decoded: Tensor = pipe.vae.decode(scaled, return_dict=False)[0]  # in [-1, 1]
    return (decoded / 2 + 0.5).clamp(0, 1)


@contextmanager
def _quiet(pipe: SamplingPipeline) -> Iterator[None]:
    """No progress bar a batch while inside; the pipeline's own setting comes back afterwards."""
    configure = getattr(pipe, "set_progress_bar_config", None)
    if configure is None:
        yield
        return
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    configure(**{**before, "disable": True})
    try:
        yield
    finally:
        configure(**before)


def _check_request(
    labels: Sequence[int],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    eta: float,
    batch_size: int,
) -> None:
    wrong = []
    if not labels or len(labels) != len(seeds):
        wrong.append(f"{len(labels)} labels and {len(seeds)} seeds, expected as many, at least one")
    if any(not 0 <= seed <= MAX_SEED for seed in seeds):
        wrong.append("a seed outside 0..2**63-1")
    if num_inference_steps < 1:
        wrong.append(f"num_inference_steps={num_inference_steps}, expected at least 1")
    if not 0 <= guidance_scale < float("inf"):
        wrong.append(f"guidance_scale={guidance_scale}, expected a finite number of at least 0")
    if not 0 <= eta <= 1:
        wrong.append(f"eta={eta}, expected 0 to 1")
    if batch_size < 1:
        wrong.append(f"batch_size={batch_size}, expected at least 1")
    if wrong:
        raise EvaluationError("sample_images", "; ".join(wrong), "Correct these arguments.")


def _check_finite(images: Tensor, labels: Sequence[int], seeds: Sequence[int]) -> None:
    broken = [i for i, image in enumerate(images) if not bool(torch.isfinite(image).all())]
    if broken:
        i = broken[0]
        raise EvaluationError(
            "sample_images",
            f"{len(broken)} of {len(images)} images have values that are not finite, "
            f"first label {labels[i]} with seed {seeds[i]}",
            "The model is broken: compare it with the float model, layer by layer.",
        )
