"""A denoiser without a pipeline behind the engine: latents of random conditions, for measurements."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqc.needs import Needs
from hqc.runtimes.base import Session
from hqc.sampling.task import Task, advance, guided, initial_sample, scaled_input, start, why_not_steps
from hqc.serving.backend import Drawing
from hqc.serving.rendezvous import PipelineSteps, Rendezvous, together
from hqc.serving.split import Split
from hqc.serving.tickets import Call, Steps

__all__ = ["LatentBackend"]


class LatentBackend:
    """Samples a task with a session; an image is the first channels of the latents, stretched to [0, 255]."""

    schedulers: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    previews = False
    most_steps = 1000

    def __init__(self, session: Session, task: Task) -> None:
        self._session, self._task, self._split = session, task, Split()
        self._meeting = Rendezvous(session)
        height, width = (*task.latent_shape[1:], 1)[:2]
        self.needs = Needs("latents", "nothing", 0, frozenset({"guidance_scale"}), (int(width), int(height)))

    @staticmethod
    @contextmanager
    def around() -> Iterator[None]:
        """See `Backend`."""
        with torch.inference_mode():
            yield

    def check_steps(self, num_inference_steps: int, scheduler: str | None) -> str | None:
        """See `Backend`."""
        return why_not_steps(self._task.new_scheduler(), num_inference_steps)

    def denoise(self, calls: Sequence[Call], at_once: int = 1) -> Sequence[Tensor]:
        """See `Backend`."""
        return together(self._session, calls, self._split, at_once)

    def begin(self, drawing: Drawing) -> Steps:
        """See `Backend`."""
        return PipelineSteps(lambda: self._draw(drawing), drawing.seed)

    def _draw(self, drawing: Drawing) -> NDArray[np.uint8]:
        generator = torch.Generator().manual_seed(drawing.seed)
        scheduler = self._task.scheduler(drawing.num_inference_steps)
        noise, conditions = start(self._task, 1, generator)
        sample = initial_sample(self._task, scheduler, noise)
        for timestep in scheduler.timesteps:
            model_input = scaled_input(self._task, scheduler, sample, timestep)
            at = float(timestep) * self._task.time_scale
            found = guided(self._denoised, model_input, at, conditions, drawing.guidance_scale)
            sample = advance(scheduler, found, timestep, sample, drawing.eta, generator)
        return _shown(sample[0])

    def _denoised(self, sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        return self._meeting(sample, timestep, *conditions)


def _shown(latents: Tensor) -> NDArray[np.uint8]:
    """[C, h, w] or [L, C] as a grey picture of the first channel."""
    plane = latents[0] if latents.ndim == 3 else latents[:, :1]
    low, high = plane.min(), plane.max()
    shown: Any = ((plane - low) / (high - low).clamp_min(1e-12) * 255).round().byte().numpy()
    return np.ascontiguousarray(shown)
