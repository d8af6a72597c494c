"""Continuous batching: images at steps of their own share one call of the denoiser.

An image is a generator. It yields what the denoiser is to be called with, is sent its output, and returns the image.
The engine's thread admits images, collects what they yield, has it run in one call a lane, and hands every image its
rows:

    queue ──admit──▶ active images ──yield──▶ [Call, Call, …] ──denoise──▶ outputs ──send──▶ next step, or the image

With several lanes the images of one take their steps while the other lanes' calls run. Nothing here knows what a
denoiser is, so that torch need not be there.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

from hqc.serving.errors import Busy, Cancelled, Stopped, TimeUp
from hqc.serving.lanes import Lanes, Run, shares
from hqc.serving.sharing import Cost, Sharing
from hqc.serving.tickets import Begin, Call, Denoise, Observer, Steps, Task, Ticket

__all__ = ["Engine", "Policy"]

log = logging.getLogger(__name__)

Policy = Literal["adaptive", "continuous", "static", "single"]
"""When a waiting image is admitted: at every step while there is room and it pays (see `Sharing`), at every step while
there is room, once all others have ended, or alone."""

MAX_RETRY_S = 600


@dataclass(eq=False)
class _Image:
    """One image that has begun: whose it is, what it waits for, and whether a lane runs that."""

    ticket: Ticket
    index: int
    steps: Steps
    wants: Call | Task | None = None
    running: bool = False


class Engine:
    """Runs images in a thread of its own until `close`.

    Args:
        denoise: runs the calls of active images; with several lanes in threads of their own, side by side.
        lanes: how many of its calls run side by side.
        max_batch: images under way at once.
        max_queue: requests that may wait; the next one is refused.
        policy: when waiting images are admitted.
        around: what the thread runs in, as `torch.inference_mode`.
        observer: see `Observer`.
        clock: seconds, of which steps are measured.
    """

    def __init__(
        self,
        denoise: Denoise,
        *,
        lanes: int = 1,
        max_batch: int = 8,
        max_queue: int = 64,
        policy: Policy = "adaptive",
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._around, self._observer = around, observer
        self._lanes: Lanes[_Image] = Lanes(denoise, lanes, self._notify)
        self._room = 1 if policy == "single" else max_batch
        self._max_queue, self._policy = max_queue, policy
        self._sharing = Sharing(lanes, clock)
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
    def limit(self) -> int:
        """How many images would share calls if all that there is room for were there."""
        return self._limit(self._room)

    @property
    def cost(self) -> Cost | None:
        """Of a step; None before enough of them have been seen."""
        return self._sharing.cost

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
        finally:
            self._lanes.close()

    def _turn(self) -> bool:
        """Admits, steps and retires once; whether there may be more to do."""
        self._wait_for_work()
        self._drop()
        if self._closing is not None and not self._active:
            return False
        for ticket, index in self._admitted():
            self._begin(ticket, index)
        self._start()
        for run in self._lanes.ended():
            self._step(run)
        return True

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait_for_work(self) -> None:
        with self._changed:
            while not (
                self._lanes.has_ended
                or (self._lanes.free and self._ready())
                or (self._waiting and self._places())
                or (self._closing is not None and not self._active)
            ):
                self._changed.wait()

    def _ready(self) -> list[_Image]:
        """Images that no lane runs."""
        return [image for image in self._active if not image.running]

    def _places(self) -> int:
        """How many images may be admitted now."""
        if self._closing is not None or (self._policy == "static" and self._active):
            return 0
        return max(0, min(self._room - len(self._active), self._limit(self._there()) - self._sharers()))

    def _limit(self, there: int) -> int:
        return self._sharing.limit(there, self._room) if self._policy == "adaptive" else self._room

    def _sharers(self) -> int:
        """Images that share calls: all that are under way, but for those whose last call is done."""
        return sum(not (isinstance(image.wants, Task) and image.wants.last) for image in self._active)

    def _there(self) -> int:
        """Images that share calls or wait for that."""
        return self._sharers() + len(self._waiting)

    def _admitted(self) -> list[tuple[Ticket, int]]:
        """What is taken out of the line now: in its order, while there is room."""
        with self._changed:
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._places()))]

    def _begin(self, ticket: Ticket, index: int) -> None:
        if ticket.ended_at is not None:
            return
        if ticket.started_at is None:
            ticket.started_at = time.monotonic()
        try:
            image = _Image(ticket, index, ticket.begins[index]())
        except Exception as error:  # of this image alone
            self._fail(ticket, error)
            return
        self._active.append(image)
        self._go_on(image, None)

    def _start(self) -> None:
        """Gives free lanes what images wait for: a task each, or their share of the calls."""
        lanes, active = self._lanes, len(self._active)
        for image in self._ready():
            if isinstance(image.wants, Task) and lanes.free:
                image.running = True
                lanes.start([image], image.wants)
        called = [image for image in self._ready() if isinstance(image.wants, Call)]
        for share in shares(called, active, lanes.free, lanes.count):
            for image in share:
                image.running = True
            calls = [image.wants for image in share if isinstance(image.wants, Call)]
            lanes.start(share, calls, max(1, lanes.count // active))

    def _step(self, run: Run[_Image]) -> None:
        """What a lane has run, and on with each of its images."""
        if self._observer is not None and run.rows:
            self._observer.step(len(run.items), run.rows, run.seconds)
        for image, output in zip(run.items, run.outputs, strict=True):
            image.running = False
            if image.ticket.ended_at is None:
                self._go_on(image, output)
        self._leave()

    def _go_on(self, image: _Image, output: Any) -> None:
        """One step of an image; it is no longer active if that was its last.

        output: of the denoiser, why there is none, or None at the start.
        """
        try:
            steps = image.steps
            image.wants = steps.throw(output) if isinstance(output, Exception) else steps.send(output)
            self._sharing.wants(image, image.wants)
            return
        except StopIteration as end:
            self._sharing.wants(image, None)
            self._done(image.ticket, image.index, end.value)
        except Exception as error:  # of this image alone
            self._fail(image.ticket, error)
        self._gone(image)

    def _gone(self, image: _Image) -> None:
        self._sharing.left(image)
        self._active.remove(image)

    def _leave(self) -> None:
        """Drops active images whose request has ended: it failed, or was left."""
        for image in [image for image in self._active if image.ticket.ended_at is not None]:
            _close(image.steps)
            self._gone(image)

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
        self._leave()

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
