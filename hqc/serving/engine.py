"""Continuous batching: images at steps of their own share one call of the denoiser.

An image is a generator. It yields what the denoiser is to be called with, is sent its output, and returns the image.
The engine's thread admits images, collects what they yield, runs it in one call, and hands every image its rows:

    queue ──admit──▶ active images ──yield──▶ [Call, Call, …] ──denoise──▶ outputs ──send──▶ next step, or the image

Nothing here knows what a denoiser is, so that torch need not be there.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from hqc.serving.errors import Busy, Cancelled, Stopped, TimeUp

__all__ = ["Begin", "Call", "Denoise", "Engine", "Observer", "Policy", "Steps", "Ticket"]

log = logging.getLogger(__name__)

Policy = Literal["continuous", "static", "single"]
"""When a waiting image is admitted: at every step while there is room, once all others have ended, or alone."""

MAX_RETRY_S = 600


@dataclass(frozen=True)
class Call:
    """What one image wants the denoiser to be called with: arrays by name, those of a sample with `rows` rows."""

    inputs: Mapping[str, Any]
    rows: int


Steps = Generator[Call, Any, Any]
"""One image under way."""

Begin = Callable[[], Steps]
"""Makes the generator of one image; called in the engine's thread."""

Denoise = Callable[[Sequence[Call]], Sequence[Any]]
"""Outputs of several calls, each with its call's rows, made in as few calls of the denoiser as can be."""


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


@dataclass
class _Image:
    """One image that has begun: whose it is, and the call that it waits for."""

    ticket: Ticket
    index: int
    steps: Steps
    call: Call


class Engine:
    """Runs images in a thread of its own until `close`.

    Args:
        denoise: runs the calls of all active images.
        max_batch: images under way at once.
        max_queue: requests that may wait; the next one is refused.
        policy: when waiting images are admitted.
        around: what the thread runs in, as `torch.inference_mode`.
        observer: see `Observer`.
    """

    def __init__(
        self,
        denoise: Denoise,
        *,
        max_batch: int = 8,
        max_queue: int = 64,
        policy: Policy = "continuous",
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        observer: Observer | None = None,
    ) -> None:
        self._denoise, self._around, self._observer = denoise, around, observer
        self._room = 1 if policy == "single" else max_batch
        self._max_queue, self._policy = max_queue, policy
        self._waiting: deque[tuple[Ticket, int]] = deque()
        self._active: list[_Image] = []
        self._changed = threading.Condition()
        self._closing: float | None = None
        self._request_s = 1.0  # of the last request that ended, for Retry-After
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> int:
        """Images under way."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Requests of which no image has begun."""
        with self._changed:
            return self._unbegun()

    @property
    def alive(self) -> bool:
        """Whether requests are taken: not closed, and the thread has not died."""
        return self._closing is None and (self._thread is None or self._thread.is_alive())

    def submit(self, begins: Sequence[Begin], *, time_limit_s: float = math.inf) -> Ticket:
        """Puts a request in the line; its images come as `ticket.result`, in order.

        The future raises what an image raised, `TimeUp` after `time_limit_s`, `Stopped` when the engine closes, or is
        cancelled after `ticket.cancel()`. Other requests do not notice.

        Raises:
            Busy: if too many wait already.
            Stopped: after `close`.
        """
        ticket = Ticket(begins, time.monotonic() + time_limit_s)
        with self._changed:
            if self._closing is not None:
                raise Stopped
            if self._unbegun() >= self._max_queue and not self._has_room():
                raise Busy(self._unbegun(), self._retry_s())
            self._waiting.extend((ticket, index) for index in range(len(begins)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hqc-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return ticket

    def close(self, grace_s: float = 0.0) -> None:
        """Refuses what waits, gives what runs `grace_s` to end, then drops it. Returns when the thread has ended."""
        self.drain(grace_s)
        if self._thread is not None:
            self._thread.join()

    def drain(self, grace_s: float) -> None:
        """The same without waiting for it; a second call shortens the time that is left."""
        with self._changed:
            until = time.monotonic() + grace_s
            self._closing = until if self._closing is None else min(self._closing, until)
            self._changed.notify_all()

    # ---- in the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._around():
                while self._turn():
                    pass
        except BaseException as error:  # a fault of the engine itself: nobody may wait for ever
            log.exception("the engine has failed")
            self._closing = 0.0
            for ticket in {ticket for ticket, _ in self._waiting} | {image.ticket for image in self._active}:
                self._fail(ticket, error)

    def _turn(self) -> bool:
        """Admits, steps and retires once; whether there may be more to do."""
        self._wait_for_work()
        self._drop()
        if self._closing is not None and not self._active:
            return False
        for ticket, index in self._admitted():
            self._begin(ticket, index)
        if self._active:
            self._step()
        return True

    def _wait_for_work(self) -> None:
        with self._changed:
            while not self._active and not self._waiting and self._closing is None:
                self._changed.wait()

    def _admitted(self) -> list[tuple[Ticket, int]]:
        """What is taken out of the line now: in its order, while there is room."""
        with self._changed:
            if self._closing is not None or (self._policy != "continuous" and self._active):
                return []
            count = min(len(self._waiting), self._room - len(self._active))
            return [self._waiting.popleft() for _ in range(count)]

    def _begin(self, ticket: Ticket, index: int) -> None:
        if ticket.ended_at is not None:
            return
        if ticket.started_at is None:
            ticket.started_at = time.monotonic()
        try:
            steps = ticket.begins[index]()
        except Exception as error:  # of this image alone
            self._fail(ticket, error)
            return
        if (image := self._advanced(ticket, index, steps, None)) is not None:
            self._active.append(image)

    def _step(self) -> None:
        """One call of the denoiser for all active images, and on with each of them."""
        start = time.perf_counter()
        outputs = self._outputs([image.call for image in self._active])
        if self._observer is not None:
            rows = sum(image.call.rows for image in self._active)
            self._observer.step(len(self._active), rows, time.perf_counter() - start)
        kept = []
        for image, output in zip(self._active, outputs, strict=True):
            if image.ticket.ended_at is not None:  # another image of the request has failed
                _close(image.steps)
            elif (after := self._advanced(image.ticket, image.index, image.steps, output)) is not None:
                kept.append(after)
        self._active = kept

    def _outputs(self, calls: Sequence[Call]) -> Sequence[Any]:
        """An output for every call; where the call for all of them fails, each by itself, so that one fails alone."""
        try:
            return self._denoise(calls)
        except Exception as error:
            if len(calls) == 1:
                return [error]
            log.warning("a call for %d images failed (%s): each is run by itself", len(calls), error)
            return [self._outputs([call])[0] for call in calls]

    def _advanced(self, ticket: Ticket, index: int, steps: Steps, output: Any) -> _Image | None:
        """An image after one step: None if that was its last. output: of the denoiser, or why there is none."""
        try:
            call = steps.throw(output) if isinstance(output, Exception) else steps.send(output)
        except StopIteration as end:
            self._done(ticket, index, end.value)
        except Exception as error:  # of this image alone
            self._fail(ticket, error)
        else:
            return _Image(ticket, index, steps, call)
        return None

    def _done(self, ticket: Ticket, index: int, image: Any) -> None:
        ticket._images[index] = image
        ticket._missing -= 1
        if ticket._missing == 0:
            self._end(ticket, None)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        if ticket.ended_at is None:
            self._end(ticket, error)

    def _end(self, ticket: Ticket, error: BaseException | None) -> None:
        ticket.ended_at = time.monotonic()
        self._request_s = ticket.ended_at - (ticket.started_at or ticket.queued_at)
        with suppress(InvalidStateError):  # nobody waits for it any more
            if error is None:
                ticket.result.set_result(ticket._images)
            elif isinstance(error, Cancelled):
                ticket.result.cancel()
            else:
                ticket.result.set_exception(error)
        if self._observer is not None:
            self._observer.ended(ticket, error)

    def _drop(self) -> None:
        """Ends requests whose client has left, whose time is up, or that may not go on while the engine closes."""
        now = time.monotonic()
        with self._changed:
            closing, over = self._closing is not None, self._closing is not None and now >= self._closing
            waiting = {ticket for ticket, _ in self._waiting}
        running = {image.ticket for image in self._active}
        for ticket in waiting | running:
            if ticket._left.is_set():
                self._fail(ticket, Cancelled())
            elif now > ticket.deadline:
                self._fail(ticket, TimeUp())
            elif over or (closing and ticket not in running):
                self._fail(ticket, Stopped())
        with self._changed:
            self._waiting = deque(entry for entry in self._waiting if entry[0].ended_at is None)
            kept = [image for image in self._active if image.ticket.ended_at is None]
        for image in self._active:
            if image.ticket.ended_at is not None:
                _close(image.steps)
        self._active = kept

    # ---- the line ----------------------------------------------------------------------------------------------------

    def _unbegun(self) -> int:
        return len({ticket for ticket, _ in self._waiting if ticket.started_at is None})

    def _has_room(self) -> bool:
        return len(self._waiting) + len(self._active) < self._room

    def _retry_s(self) -> int:
        """When it is worth trying again: once the requests in the line have had their turn, about."""
        return min(MAX_RETRY_S, max(1, math.ceil(self._request_s)))


def _close(steps: Steps) -> None:
    try:
        steps.close()
    except Exception:  # its own ending has failed: nothing that another image could notice
        log.exception("an image could not be left cleanly")
