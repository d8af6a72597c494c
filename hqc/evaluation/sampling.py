"""Images from any pipeline, where each image depends on its own seed and on its label or prompt only."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.images import pixels_of
from hqc.evaluation.needs import denoiser_of, needs_of
from hqc.evaluation.protocol import MAX_SEED, SamplingProtocol, describe_prompts, describe_seeds
from hqc.needs import Needs
from hqc.quiet import quiet_libraries
from hqc.sampling.prompt_encoding import condition_tokens
from hqc.sampling.task import require_steps

__all__ = [
    "MAX_SEED",
    "Samples",
    "SamplingPipeline",
    "SamplingProtocol",
    "as_one_line",
    "asked_options",
    "call_options",
    "call_pipeline",
    "check_finite",
    "describe_prompts",
    "describe_seeds",
    "sample_images",
]


class SamplingPipeline(Protocol):
    """What is asked of a pipeline: a scheduler, a unet or transformer, and a call that `hqc.evaluation.needs` knows."""

    scheduler: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Samples:
    """Images and the latents they were decoded from, in one order with their labels and seeds.

    Args:
        images: `[N, C, H, W]`, float32 in [0, 1].
        latents: `[N, …]`, float32, as the sampler left them (the VAE takes them / scaling factor); None of a
            pipeline that does not show them (DDPM, DDIM, DiT, diffusers' LDM).
        labels: N classes, or numbers of prompts; all 0 for a model that is asked for nothing.
        seeds: N seeds.
        protocol: how they were sampled.
        prompts: what the labels count, of a text-conditional model.
        labelled: whether the labels mean something.

    Raises:
        EvaluationError: the lengths differ, the images are not 4-D, or a pixel is not in [0, 1].
    """

    images: Tensor
    latents: Tensor | None
    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    protocol: SamplingProtocol
    prompts: tuple[str, ...] = ()
    labelled: bool = True

    def __post_init__(self) -> None:
        latents = self.images if self.latents is None else self.latents
        lengths = {len(self.images), len(latents), len(self.labels), len(self.seeds)}
        if len(lengths) != 1 or self.images.ndim != 4 or latents.ndim < 2:
            raise EvaluationError(
                "Samples",
                f"images {list(self.images.shape)}, latents {list(latents.shape)}, "
                f"{len(self.labels)} labels and {len(self.seeds)} seeds; expected [N, C, H, W] and N of each",
                "Build Samples with sample_images.",
            )
        if not bool(((self.images >= 0) & (self.images <= 1)).all()):
            raise EvaluationError("Samples", "a pixel is not in [0, 1]", "Clamp the images first.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, px."""
        height, width = self.images.shape[2:]
        return height, width

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """One image as 8-bit numbers, `[H, W]` or `[H, W, C]`."""
        return pixels_of(self.images[index])


def sample_images(
    pipe: SamplingPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    eta: float,
    batch_size: int,
    prompts: Sequence[str] = (),
    negative_prompt: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Sample one image per (label, seed) and keep its latent from the same run.

    Image i draws all of its noise from `torch.Generator("cpu").manual_seed(seeds[i])`, so it depends on its
    seed and label and not on its neighbours; another `batch_size` changes it by float rounding at most. (A pipeline
    of diffusers that does not hand the generators to a stochastic scheduler draws that noise from the batch's first
    seed.)

    Args:
        pipe: the pipeline; its denoiser may be an integer runtime.
        labels: N classes; of a text-conditional pipeline N numbers of prompts; of others they only count images.
        seeds: N seeds in 0…2⁶³−1.
        num_inference_steps: denoising steps, at least 1.
        guidance_scale: classifier-free guidance, at least 0; none up to 1.
        eta: noise of DDIM, 0…1.
        batch_size: images a call of the pipeline, at least 1.
        prompts: of a text-conditional pipeline. negative_prompt: what guidance leads away from.
        progress: called with (images done, N) after every batch.

    Raises:
        EvaluationError: lengths that differ, values out of range, a pipeline that needs something else, or a model that
            gives non-finite images.
        TrainingError: if the scheduler does not take so many steps.
    """
    _check_request(labels, seeds, num_inference_steps, guidance_scale, eta, batch_size)
    needs = needs_of(pipe)
    _check_asked(needs, labels, prompts, guidance_scale)
    require_steps(pipe.scheduler, num_inference_steps)
    options = call_options(needs, pipe, num_inference_steps, guidance_scale, eta)
    images, latents = [], list[Tensor | None]()
    with torch.inference_mode(), _quiet(pipe):
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            asked = asked_options(needs, labels[part], prompts, negative_prompt)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeds[start])
                image, latent = call_pipeline(pipe, {**options, **asked}, seeds[part])
            images.append(image)
            latents.append(latent)
            if progress is not None:
                progress(min(start + batch_size, len(labels)), len(labels))
    all_images = torch.cat(images)  # outside inference mode: ordinary tensors
    check_finite(all_images, labels, seeds)
    kept = [latent for latent in latents if latent is not None]
    return Samples(
        all_images,
        torch.cat(kept) if kept else None,
        tuple(labels) if needs.kind != "nothing" else (0,) * len(labels),
        tuple(seeds),
        _protocol(needs, pipe, num_inference_steps, guidance_scale, eta, negative_prompt),
        tuple(prompts),
        labelled=needs.kind != "nothing",
    )


def _protocol(
    needs: Needs, pipe: SamplingPipeline, steps: int, guidance: float, eta: float, negative: str
) -> SamplingProtocol:
    if "guidance_scale" not in needs.options:
        guidance = 1.0
    elif not needs.distilled:
        guidance = max(1.0, guidance)
    return SamplingProtocol(
        type(pipe.scheduler).__name__,
        steps,
        guidance,
        eta if "eta" in needs.options else 0.0,
        negative if "negative_prompt" in needs.options else "",
    )


def _check_asked(needs: Needs, labels: Sequence[int], prompts: Sequence[str], guidance_scale: float) -> None:
    needs.check_guidance(guidance_scale)
    if needs.kind == "class_label":
        needs.check_labels(labels)
    if bool(prompts) != (needs.kind == "prompt"):
        takes = {"prompt": "prompts", "class_label": "class labels and no prompts", "nothing": "no prompts"}
        raise EvaluationError(
            needs.pipeline, f"takes {takes[needs.kind]}; found {len(prompts)} prompts", "Ask it for what it takes."
        )
    if needs.kind == "prompt" and any(not 0 <= label < len(prompts) for label in labels):
        raise EvaluationError(
            "labels", f"found {max(labels)}, expected numbers of the {len(prompts)} prompts", "Correct the labels."
        )


def call_options(needs: Needs, pipe: SamplingPipeline, steps: int, guidance: float, eta: float) -> dict[str, Any]:
    """The keywords of every call that do not depend on the image: those of them that the pipeline takes."""
    width, height = needs.size
    parameters = inspect.signature(type(pipe).__call__).parameters
    given = {
        "num_inference_steps": steps,
        # Up to 1 there is none, which not every pipeline of diffusers says of less than 1.
        "guidance_scale": guidance if needs.distilled else max(1.0, guidance),
        "eta": eta,
        "height": height,
        "width": width,
        "use_resolution_binning": False,  # PixArt: the size is the captured one, not the nearest of a list
        "max_sequence_length": condition_tokens(pipe, getattr(denoiser_of(pipe), "inputs", ())),
        "output_type": "np",
        "return_dict": False,
    }
    return {name: value for name, value in given.items() if name in parameters and value is not None}


def asked_options(needs: Needs, labels: Sequence[int], prompts: Sequence[str], negative: str) -> dict[str, Any]:
    """The keywords that say what the images show."""
    if needs.kind == "class_label":
        return {"class_labels": list(labels), **({"batch_size": len(labels)} if needs.counts else {})}
    if needs.kind == "nothing":
        return {"batch_size": len(labels)}
    away = {"negative_prompt": [negative] * len(labels)} if negative and "negative_prompt" in needs.options else {}
    return {"prompt": [prompts[label] for label in labels], **away}


def call_pipeline(
    pipe: SamplingPipeline, options: dict[str, Any], seeds: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Images `[N, C, H, W]` in [0, 1] of one call, and the latents that its last step left.

    options: of `call_options` and `asked_options`. Noise is drawn from a generator an image; what a pipeline draws
    without one is drawn from torch's own.
    """
    last: list[Tensor] = []

    def keep(_step: int, _timestep: Any, latents: Tensor) -> None:
        last[:] = [latents]

    def at_end(_pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        keep(step, timestep, tensors["latents"])
        return tensors

    parameters = inspect.signature(type(pipe).__call__).parameters
    if "callback_on_step_end" in parameters:
        options = {**options, "callback_on_step_end": at_end}
    elif "callback" in parameters:  # pipelines of diffusers that have not moved to the other one
        options = {**options, "callback": keep, "callback_steps": 1}
    output = pipe(**options, generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds])
    images = torch.from_numpy(np.asarray(output[0])).permute(0, 3, 1, 2)
    return images.float().contiguous(), last[0].float().cpu() if last else None


@contextmanager
def as_one_line(model: str, pipe: Any) -> Iterator[None]:
    """What diffusers' pipelines raise for configurations that they were not written for, as an EvaluationError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        said = " ".join(str(error).split())[:120]
        raise EvaluationError(
            model,
            f"its {type(pipe).__name__} cannot be run ({type(error).__name__}: {said})",
            "Check the pipeline's configurations, or run it from Python with hqc.load(…).as_denoiser().",
        ) from error


@contextmanager
def _quiet(pipe: SamplingPipeline) -> Iterator[None]:
    """No progress bar a batch and no lines of diffusers while inside; both are as before afterwards."""
    configure = getattr(pipe, "set_progress_bar_config", None)
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    with quiet_libraries():
        if configure is None:
            yield
            return
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


def check_finite(images: Tensor, labels: Sequence[int], seeds: Sequence[int]) -> None:
    """Refuses images with NaN or infinity.

    Raises:
        EvaluationError: naming the first by label and seed.
    """
    broken = [i for i, image in enumerate(images) if not bool(torch.isfinite(image).all())]
    if broken:
        i = broken[0]
        raise EvaluationError(
            "sample_images",
            f"{len(broken)} of {len(images)} images have values that are not finite, "
            f"first label {labels[i]} with seed {seeds[i]}",
            "The model is broken: compare it with the float model, layer by layer.",
        )
