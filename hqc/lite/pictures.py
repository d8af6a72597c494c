"""A set of images from a pipeline without torch, as `hqc sample` shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hqc.errors import EvaluationError
from hqc.evaluation.protocol import SamplingProtocol
from hqc.lite.pipeline import LitePipeline
from hqc.serving.backend import Drawing

__all__ = ["LitePictures", "draw_pictures"]


@dataclass(frozen=True)
class LitePictures:
    """Images in one order; see `hqc.evaluation.protocol.Pictures`."""

    images: tuple[NDArray[np.uint8], ...]
    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    protocol: SamplingProtocol
    prompts: tuple[str, ...]
    labelled: bool

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, px."""
        height, width = self.images[0].shape[:2]
        return height, width

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """One image as 8-bit numbers, `[H, W]` or `[H, W, C]`."""
        return self.images[index]


def draw_pictures(
    pipe: LitePipeline,
    labels: Sequence[int],
    seed: int,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    eta: float,
    batch_size: int | None = None,
    prompts: Sequence[str] = (),
    negative_prompt: str = "",
    loras: Mapping[str, float] | None = None,
) -> LitePictures:
    """One image a label, from consecutive seeds; labels count the prompts where there are some.

    loras: scales of those of `pipe.loras` that are not to be as they were attached.

    Raises:
        EvaluationError: for steps that the scheduler does not take, or what the pipeline is not asked with.
    """
    if (refusal := pipe.check_steps(num_inference_steps, None)) is not None:
        found, _, do = refusal.partition(". ")
        raise EvaluationError(f"{num_inference_steps} steps", found, do)
    seeds = tuple(range(seed, seed + len(labels)))
    drawings = [
        Drawing(
            label=0 if prompts else label,
            prompt=prompts[label] if prompts else None,
            negative_prompt=negative_prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            loras=tuple((loras or {}).items()),
        )
        for label, seed in zip(labels, seeds, strict=True)
    ]
    guidance = max(1.0, guidance_scale) if "guidance_scale" in pipe.needs.options else 1.0
    protocol = SamplingProtocol(pipe.sampler, num_inference_steps, guidance, eta, negative_prompt)
    labelled = pipe.needs.kind != "nothing"
    images = tuple(pipe.draw_all(drawings, batch_size or pipe.needs.at_once))
    return LitePictures(images, tuple(labels), seeds, protocol, tuple(prompts), labelled)
