"""A diffusers pipeline behind the engine: what it can be asked for, and every image as steps."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqc.evaluation.images import pixels_of
from hqc.evaluation.needs import denoiser_of, needs_of
from hqc.evaluation.previews import can_preview, decoded, predicted, watch_steps
from hqc.evaluation.sampling import SamplingPipeline, asked_options, call_options, call_pipeline, check_finite
from hqc.quiet import quiet_libraries
from hqc.runtimes.base import Session
from hqc.runtimes.unet import SessionUNet
from hqc.sampling.task import why_not_steps
from hqc.serving.backend import Drawing, preview_steps
from hqc.serving.rendezvous import PipelineSteps, Rendezvous, apart, together, under_way
from hqc.serving.schedulers import scheduler_names, scheduler_of
from hqc.serving.split import Split
from hqc.serving.tickets import Call, Steps
from hqc.styles.record import attached_names

__all__ = ["PipelineBackend"]

MAX_STEPS = 1000  # of a scheduler that names none
_PROMPTS = 64  # whose encodings are kept
_REMEMBERED = 512  # numbers of steps that were tried


class PipelineBackend:
    """Draws with a pipeline whose denoiser is a session; of a plain module every image is one step of its own."""

    def __init__(self, pipe: SamplingPipeline) -> None:
        self._pipe: Any = pipe
        self._split = Split()
        self._why_not = lru_cache(_REMEMBERED)(
            lambda steps, scheduler: why_not_steps(scheduler_of(self._pipe.scheduler, scheduler), steps)
        )
        self.needs = needs_of(pipe)
        denoiser = denoiser_of(pipe)
        self._session: Session | None = None
        if isinstance(denoiser, SessionUNet):
            self._session = denoiser.session
            denoiser.session = Rendezvous(self._session)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        if hasattr(self._pipe, "encode_prompt"):
            self._pipe.encode_prompt = apart(_remembering(self._pipe.encode_prompt))
        for name in ("vae", "vqvae"):
            decoder: Any = getattr(pipe, name, None)
            if hasattr(decoder, "decode"):
                decoder.decode = apart(decoder.decode, last=True)

    @property
    def schedulers(self) -> tuple[str, ...]:
        """Names of schedulers that may be asked for."""
        return scheduler_names(self._pipe.scheduler)

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of LoRAs that are attached to the denoiser."""
        return attached_names(spec.name for spec in getattr(denoiser_of(self._pipe), "inputs", ()))

    @property
    def previews(self) -> bool:
        """Whether the pipeline's own scheduler, and with it all that may be asked for, tells what it is drawing."""
        return can_preview(self._pipe.scheduler)

    @property
    def most_steps(self) -> int:
        """How many steps its scheduler was trained on; one of continuous time has no such number."""
        return int(getattr(self._pipe.scheduler.config, "num_train_timesteps", None) or MAX_STEPS)

    @staticmethod
    @contextmanager
    def around() -> Iterator[None]:
        """What the engine's thread runs in."""
        with quiet_libraries(), torch.inference_mode():
            yield

    def check_steps(self, num_inference_steps: int, scheduler: str | None) -> str | None:
        """Why a scheduler does not take so many steps; None if it does."""
        return self._why_not(num_inference_steps, scheduler)

    def denoise(self, calls: Sequence[Call], at_once: int = 1) -> Sequence[Tensor]:
        """The engine's `Denoise`."""
        assert self._session is not None  # a plain module makes no calls
        return together(self._session, calls, self._split, at_once)

    def begin(self, drawing: Drawing) -> Steps:
        """One image as steps: pixels [H, W] or [H, W, 3] in the end.

        It raises what the pipeline raises, and EvaluationError for an image that is not finite.
        """
        pipe = copy.copy(self._pipe)
        pipe.scheduler = scheduler_of(self._pipe.scheduler, drawing.scheduler)
        if drawing.previews:
            self._show(pipe, drawing)
        if drawing.loras:
            _style(pipe, drawing.loras)
        return PipelineSteps(lambda: self._draw(pipe, drawing), drawing.seed)

    def _draw(self, pipe: Any, drawing: Drawing) -> NDArray[np.uint8]:
        steps, guidance, eta = drawing.num_inference_steps, drawing.guidance_scale, drawing.eta
        prompts = () if drawing.prompt is None else (drawing.prompt,)
        options = call_options(self.needs, pipe, steps, guidance, eta)
        asked = asked_options(self.needs, [drawing.label], prompts, drawing.negative_prompt)
        images, _ = call_pipeline(pipe, {**options, **asked}, [drawing.seed])
        check_finite(images, [drawing.label], [drawing.seed])
        return pixels_of(images[0])

    def _show(self, pipe: Any, drawing: Drawing) -> None:
        """Makes the drawing's scheduler hand out previews after the steps of `preview_steps`."""
        scheduler, done = pipe.scheduler, 0

        def look(timestep: float, sample: Tensor, output: Tensor) -> None:
            nonlocal done
            done += 1
            steps = preview_steps(len(scheduler.timesteps), drawing.previews)
            if done in steps and drawing.see is not None:
                with under_way():
                    image = decoded(pipe, predicted(scheduler, timestep, sample, output), self.needs.size)[0]
                drawing.see(steps.index(done), pixels_of(image))

        watch_steps(scheduler, look)


def _style(pipe: Any, scales: tuple[tuple[str, float], ...]) -> None:
    """Gives a drawing's pipeline a denoiser of its own, with these scales, over the same session."""
    part = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    denoiser = denoiser_of(pipe).styled(dict(scales))
    setattr(pipe, part, denoiser)


def _remembering(encode: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's `encode_prompt` that encodes the same words once: for the images of a request, and for the next."""
    kept: OrderedDict[str, Any] = OrderedDict()
    lock = threading.Lock()  # lanes may ask at once

    def encoded(*arguments: Any, **options: Any) -> Any:
        given = [*arguments, *options.values()]
        if any(isinstance(value, Tensor) for value in given):
            return encode(*arguments, **options)
        key = repr((arguments, sorted(options.items())))
        with lock:
            if key not in kept:
                kept[key] = encode(*arguments, **options)
                if len(kept) > _PROMPTS:
                    kept.popitem(last=False)
            kept.move_to_end(key)
            return kept[key]

    return encoded
