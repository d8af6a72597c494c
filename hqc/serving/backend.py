"""What draws behind the server: one interface, whether torch is there or not."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hqc.needs import Needs
from hqc.serving.tickets import Call, Steps

__all__ = ["Backend", "Drawing", "See", "preview_steps"]

See = Callable[[int, NDArray[np.uint8]], None]
"""(number of the preview, its pixels)."""


@dataclass(frozen=True)
class Drawing:
    """One image of a request: a class or a prompt, its seed, and how it is sampled.

    label: the class; 0 for a prompt, and for a model that is asked for nothing. scheduler: a name of
    `Backend.schedulers`, None for the pipeline's own. previews: how many; `see` is given them. loras: scales of those
    of `Backend.loras` that are not to be as they were attached.
    """

    label: int
    prompt: str | None
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    eta: float = 0.0
    scheduler: str | None = None
    previews: int = 0
    see: See | None = None
    loras: tuple[tuple[str, float], ...] = ()


class Backend(Protocol):
    """A pipeline as the engine and the server need it."""

    @property
    def needs(self) -> Needs:
        """What a request must say."""

    @property
    def schedulers(self) -> tuple[str, ...]:
        """Names of schedulers that may be asked for."""

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of LoRAs whose scales may be asked for."""

    @property
    def previews(self) -> bool:
        """Whether there are previews."""

    @property
    def most_steps(self) -> int:
        """The largest number of denoising steps."""

    def around(self) -> AbstractContextManager[Any]:
        """What the engine's thread runs in."""

    def check_steps(self, num_inference_steps: int, scheduler: str | None) -> str | None:
        """Why a scheduler does not take so many steps; None if it does."""

    def denoise(self, calls: Sequence[Call], at_once: int = 1) -> Sequence[Any]:
        """The engine's `Denoise`."""

    def begin(self, drawing: Drawing) -> Steps:
        """One image as steps: pixels, uint8 [H, W] or [H, W, 3], in the end."""


def preview_steps(steps: int, previews: int) -> list[int]:
    """After which steps there is a preview, evenly: fewer where there are fewer steps.

    >>> preview_steps(20, 3), preview_steps(2, 3), preview_steps(1, 2)
    ([5, 10, 15], [1], [])
    """
    wanted = (steps * (index + 1) // (previews + 1) for index in range(previews))
    return sorted({step for step in wanted if 0 < step < steps})
