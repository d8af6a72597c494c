"""What the engine runs: requests, their images as generators, and the calls of the denoiser that they yield."""

import math
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Begin", "Call", "Denoise", "Observer", "Steps", "Task", "Ticket"]


@dataclass(frozen=True)
class Call:
    """What one image wants the denoiser to be called with: arrays by name, those of a sample with `rows` rows."""

    inputs: Mapping[str, Any]
    rows: int


@dataclass(frozen=True)
class Task:
    """What one image wants to have run by itself, beside the calls of others: a decoder, a text encoder.

    last: no call of the denoiser follows.
    """

    run: Callable[[], Any]
    last: bool = False


Steps = Generator[Call | Task, Any, Any]
"""One image under way."""

Begin = Callable[[], Steps]
"""Makes the generator of one image; called in the engine's thread."""

Denoise = Callable[[Sequence[Call], int], Sequence[Any]]
"""Outputs of several calls, each with its call's rows, made in as few calls of the denoiser as can be.

The number says how many may run side by side: above 1 where there are fewer images than lanes.
"""


class Observer(Protocol):
    """Is told what the engine does, in its thread; must be quick."""

    def step(self, images: int, rows: int, seconds: float) -> None:
        """One call of the denoiser."""

    def ended(self, ticket: "Ticket", error: BaseException | None) -> None:
        """A request is done: its images are there, or it failed with `error`, or was left (`Cancelled`)."""


class Ticket:
    """A request under way: its images, and how far they are.

    Args:
        begins: one an image.
        deadline: in seconds of `time.monotonic`, after which it fails with `TimeUp`.
    """

    def __init__(self, begins: Sequence[Begin], deadline: float = math.inf) -> None:
        self.begins, self.deadline = tuple(begins), deadline
        self.result: Future[list[Any]] = Future()
        self.queued_at = time.monotonic()
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self._left = threading.Event()
        self._images: list[Any] = [None] * len(self.begins)
        self._missing = len(self.begins)

    def cancel(self) -> None:
        """Its images leave at the next step, or are never begun. May be called from any thread, at any time."""
        self._left.set()

    @property
    def queue_s(self) -> float:
        """Seconds before the first image was begun."""
        until = self.started_at or self.ended_at or time.monotonic()
        return until - self.queued_at

    @property
    def run_s(self) -> float:
        """Seconds from there to the end."""
        return 0.0 if self.started_at is None else (self.ended_at or time.monotonic()) - self.started_at
