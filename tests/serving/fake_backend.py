"""A backend without torch: pictures of a digit's number, denoised in microseconds, at a gate, or never."""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from hqc.needs import Needs
from hqc.serving.backend import Drawing, preview_steps
from hqc.serving.tickets import Call, Steps

SIZE = 16


class FakeBackend:
    """Draws what depends on label, seed, steps and guidance. With `gate` set, every call of the denoiser waits."""

    needs = Needs(
        "ClassConditionalLDMPipeline",
        "class_label",
        10,
        frozenset({"guidance_scale", "eta"}),
        (SIZE, SIZE),
        digits=True,
    )
    schedulers: tuple[str, ...] = ("ddim", "euler")
    loras: tuple[str, ...] = ("ink", "oil")
    previews = True
    most_steps = 1000

    def __init__(self) -> None:
        self.gate: threading.Event | None = None
        self.entered = threading.Semaphore(0)
        self.begun: list[Drawing] = []
        self.batches: list[int] = []
        self.failure: Exception | None = None

    def around(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def check_steps(self, num_inference_steps: int, scheduler: str | None) -> str | None:
        if scheduler == "euler" and num_inference_steps < 2:
            return "euler cannot take them (too few). Give more steps."
        return None

    def denoise(self, calls: Sequence[Call], at_once: int = 1) -> list[Any]:
        self.batches.append(len(calls))
        self.entered.release()
        if self.gate is not None:
            assert self.gate.wait(30)
        if self.failure is not None:
            raise self.failure
        return [0.97 * call.inputs["x"] for call in calls]

    def begin(self, drawing: Drawing) -> Steps:
        self.begun.append(drawing)
        noise = np.random.default_rng(drawing.seed).uniform(0, 1, (SIZE, SIZE))
        x = noise * (100 + len(drawing.scheduler or "")) + 5 * drawing.label + sum(scale for _, scale in drawing.loras)
        shown = preview_steps(drawing.num_inference_steps, drawing.previews)
        for step in range(1, drawing.num_inference_steps + 1):
            x = (yield Call({"x": x}, 2)) + drawing.guidance_scale
            if step in shown and drawing.see is not None:
                drawing.see(shown.index(step), pixels(x))
        return pixels(x)


def pixels(x: Any) -> Any:
    return np.round(np.clip(x, 0, 255)).astype(np.uint8)
