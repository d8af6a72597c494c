"""One thread that samples, and a bounded line of jobs before it."""

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from hqc.serving.errors import ApiError

__all__ = ["Worker"]

Result = TypeVar("Result")
MAX_RETRY_S = 600


class Worker:
    """Runs jobs one at a time in a thread of its own, so that the event loop goes on answering.

    A pipeline is not thread-safe (its scheduler holds state), so one thread is also the lock.

    Args:
        max_queue: jobs that may wait while one runs.
    """

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._unfinished = 0
        self._last_job_s = 1.0

    @property
    def unfinished(self) -> int:
        """Jobs that run or wait."""
        return self._unfinished

    async def run(self, job: Callable[[], Result]) -> Result:
        """The job's result, or what it raised.

        Raises:
            ApiError: 429 with Retry-After, when the line is full.
        """
        future = self._submit(job)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drop the jobs that wait, and end the thread after the one that runs; a later job starts another."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, job: Callable[[], Result]) -> "Future[Result]":
        with self._lock:
            if self._unfinished > self._max_queue:
                raise self._full()
            self._unfinished += 1
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hqc-sampler")
        future = self._executor.submit(self._timed, job)
        future.add_done_callback(self._finished)
        return future

    def _timed(self, job: Callable[[], Result]) -> Result:
        start = time.monotonic()
        try:
            return job()
        finally:
            self._last_job_s = time.monotonic() - start

    def _finished(self, _: "Future[Any]") -> None:
        with self._lock:
            self._unfinished -= 1

    def _full(self) -> ApiError:
        wait_s = min(MAX_RETRY_S, max(1, math.ceil(self._last_job_s)))
        return ApiError(
            429,
            f"{self._unfinished - 1} requests are waiting already; try again in {wait_s} s",
            code="queue_full",
            headers={"Retry-After": str(wait_s)},
        )
