"""How images were sampled, in words; what a grid shows of them. Importing this loads nothing heavy."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_SEED", "Pictures", "SamplingProtocol", "describe_prompts", "describe_seeds"]

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingProtocol:
    """How images were sampled; two sets of images are comparable only if these are equal.

    Args:
        sampler: class name of the scheduler.
        num_inference_steps: denoising steps an image.
        guidance_scale: classifier-free guidance; 1 is none, and stands for everything below.
        eta: noise of DDIM, 0 (deterministic) to 1.
        negative_prompt: what guidance leads away from.
    """

    sampler: str
    num_inference_steps: int
    guidance_scale: float
    eta: float
    negative_prompt: str = ""

    def describe(self) -> str:
        """One line for titles and footnotes."""
        away = f", negative prompt {self.negative_prompt!r}" if self.negative_prompt else ""
        steps = f"{self.sampler}, {self.num_inference_steps} steps"
        return f"{steps}, guidance {self.guidance_scale:g}, eta {self.eta:g}{away}"


class Pictures(Protocol):
    """Images in one order with their labels and seeds, as `Samples` holds them."""

    @property
    def labels(self) -> tuple[int, ...]:
        """Classes, or numbers of prompts."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """One an image."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the labels count, of a text-conditional model."""

    @property
    def labelled(self) -> bool:
        """Whether the labels mean something."""

    @property
    def protocol(self) -> SamplingProtocol:
        """How they were sampled."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, px."""

    def __len__(self) -> int: ...

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """One image as 8-bit numbers, `[H, W]` or `[H, W, C]`."""


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


def describe_prompts(prompts: Sequence[str]) -> str:
    """How many prompts, and a digest of them: `2 prompts, sha256 …`."""
    digest = hashlib.sha256("\n".join(prompts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''}, sha256 {digest}"
