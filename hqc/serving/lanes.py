"""Calls of the denoiser side by side: each lane runs a share of the images in a thread of its own."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hqc.serving.tickets import Call, Denoise, Task

__all__ = ["Lanes", "Run", "shares"]

log = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Run(Generic[Item]):
    """What a lane has run: an output for each of `items`, or the exception of its call.

    rows: of the denoiser; 0 of a task.
    """

    items: Sequence[Item]
    outputs: Sequence[Any]
    rows: int
    seconds: float


class Lanes(Generic[Item]):
    """`count` threads that run `denoise`; of one lane it is the caller's own thread.

    on_end: called in a lane's thread when a run has ended.
    """

    def __init__(self, denoise: Denoise, count: int, on_end: Callable[[], None]) -> None:
        self.count = count
        self._denoise, self._on_end = denoise, on_end
        self._pool = ThreadPoolExecutor(count, "hqc-lane") if count > 1 else None
        self._busy = 0
        self._ended: deque[Future[Run[Item]]] = deque()

    @property
    def free(self) -> int:
        """Lanes that wait for work."""
        return self.count - self._busy

    @property
    def has_ended(self) -> bool:
        """Whether there is a run to be taken."""
        return bool(self._ended)

    def start(self, items: Sequence[Item], wanted: Sequence[Call] | Task, at_once: int = 1) -> None:
        """Runs the calls of some items, or the task of one; see `Denoise` for at_once."""
        self._busy += 1
        if self._pool is None:
            done: Future[Run[Item]] = Future()
            done.set_result(self._run(items, wanted, at_once))
            self._ended.append(done)
        else:
            self._pool.submit(self._run, items, wanted, at_once).add_done_callback(self._put)

    def ended(self) -> list[Run[Item]]:
        """Runs that have ended since it was asked last."""
        found = []
        while self._ended:
            self._busy -= 1
            found.append(self._ended.popleft().result())
        return found

    def close(self) -> None:
        """Returns when all lanes have."""
        if self._pool is not None:
            self._pool.shutdown()

    def _put(self, done: Future[Run[Item]]) -> None:
        self._ended.append(done)
        self._on_end()

    def _run(self, items: Sequence[Item], wanted: Sequence[Call] | Task, at_once: int) -> Run[Item]:
        start = time.perf_counter()
        if isinstance(wanted, Task):
            return Run(items, [_result(wanted)], 0, time.perf_counter() - start)
        outputs = self._outputs(wanted, at_once)
        return Run(items, outputs, sum(call.rows for call in wanted), time.perf_counter() - start)

    def _outputs(self, calls: Sequence[Call], at_once: int) -> Sequence[Any]:
        """An output for every call; where the call for all of them fails, each by itself, so that one fails alone."""
        try:
            return self._denoise(calls, at_once)
        except Exception as error:
            if len(calls) == 1:
                return [error]
            log.warning("a call for %d images failed (%s): each is run by itself", len(calls), error)
            return [self._outputs([call], at_once)[0] for call in calls]


def _result(task: Task) -> Any:
    try:
        return task.run()
    except Exception as error:
        return error


def shares(ready: Sequence[Item], active: int, free: int, count: int) -> list[Sequence[Item]]:
    """What free lanes are given of the images that are ready: no lane more than its part of all that are active.

    >>> shares("abcdefg", 7, 2, 2), shares("abc", 7, 1, 2), shares("abcdef", 7, 1, 2)
    (['abcd', 'efg'], ['abc'], ['abcd'])
    """
    size = max(1, math.ceil(active / count))
    return [ready[start : start + size] for start in range(0, len(ready), size)][:free]
