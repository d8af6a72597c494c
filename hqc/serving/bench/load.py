"""Clients: requests with steps of their own, at moments of a Poisson process, or always so many at once."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hqc.errors import EvaluationError

__all__ = ["Answer", "Arrival", "arrivals", "offered", "saturated"]

_LONGEST_LINE = 64 * 2**20
_TIME_LIMIT_S = 3600


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds from the start, and its body."""

    at_s: float
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """Seconds from sending a request to its first preview (None where there are none) and to its image."""

    first_s: float | None
    done_s: float


def arrivals(rate: float, count: int, steps: tuple[int, int], base: dict[str, Any], seed: int) -> list[Arrival]:
    """`count` requests of a Poisson process of `rate` a second, steps uniform in `steps`; `base` is in every body.

    Raises:
        ValueError: unless 0 < rate, 0 < count and 0 < steps[0] <= steps[1].
    """
    if not (rate > 0 and count > 0 and 0 < steps[0] <= steps[1]):
        raise ValueError(f"rate {rate}, count {count}, steps {steps}")
    rng = np.random.default_rng(seed)
    moments = np.cumsum(rng.exponential(1 / rate, count))
    return [
        Arrival(float(at), {**base, "seed": index, "num_inference_steps": int(rng.integers(steps[0], steps[1] + 1))})
        for index, at in enumerate(moments)
    ]


def offered(port: int, coming: Sequence[Arrival], on_done: Callable[[int], None]) -> list[Answer]:
    """Sends every request at its moment, whatever has been answered; the answers in their order.

    Raises:
        EvaluationError: for an answer that is no image.
    """
    return asyncio.run(_offered(port, coming, on_done))


def saturated(port: int, coming: Sequence[Arrival], at_once: int, on_done: Callable[[int], None]) -> float:
    """Images a second while `at_once` requests are always under way; the moments of `coming` are not used.

    The time runs until the last image, in whose shadow some places are empty: give many more than `at_once`.

    Raises:
        EvaluationError: for an answer that is no image.
    """
    return asyncio.run(_saturated(port, coming, at_once, on_done))


async def _offered(port: int, coming: Sequence[Arrival], on_done: Callable[[int], None]) -> list[Answer]:
    start, done = time.perf_counter(), 0

    async def one(arrival: Arrival) -> Answer:
        nonlocal done
        await asyncio.sleep(max(0.0, arrival.at_s - (time.perf_counter() - start)))
        answer = await _ask(port, arrival.body)
        done += 1
        on_done(done)
        return answer

    return list(await asyncio.gather(*map(one, coming)))


async def _saturated(port: int, coming: Sequence[Arrival], at_once: int, on_done: Callable[[int], None]) -> float:
    left, done = list(reversed(coming)), 0

    async def client() -> None:
        nonlocal done
        while left:
            await _ask(port, left.pop().body)
            done += 1
            on_done(done)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return len(coming) / (time.perf_counter() - start)


async def _ask(port: int, body: dict[str, Any]) -> Answer:
    content = json.dumps({**body, "stream": True}).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LONGEST_LINE)
    try:
        writer.write(head.encode() + content)
        async with asyncio.timeout(_TIME_LIMIT_S):
            return await _answer(reader, start)
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader, start: float) -> Answer:
    status = (await reader.readline()).decode("latin-1").split(" ")
    first: float | None = None
    last = b""
    while line := await reader.readline():
        last = line.strip() or last
        if line.startswith(b"event: image_generation.partial_image") and first is None:
            first = time.perf_counter() - start
        if line.startswith(b"event: image_generation.completed"):
            return Answer(first, time.perf_counter() - start)
    found = f"answered {' '.join(status[1:2])} ({last[:120].decode('utf-8', 'replace')})"
    raise EvaluationError("bench-serve", found, "Serve the model with hqc serve to see more.")
