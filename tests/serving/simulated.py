"""The engine on a clock of its own: a denoiser whose calls cost what they are said to, requests at given moments."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqc.serving.engine import Engine, Policy
from hqc.serving.tickets import Call, Steps

__all__ = ["Request", "latencies", "poisson"]

WAIT_S = 60


@dataclass(frozen=True)
class Request:
    """One image: when it is asked for, its calls of the denoiser, and the rows of each."""

    at_s: float
    steps: int
    rows: int = 2


def poisson(rate: float, count: int, seed: int, rows: Sequence[int] = (2,)) -> list[Request]:
    """Requests of 10 to 30 steps, so many a second."""
    rng = np.random.default_rng(seed)
    moments = np.cumsum(rng.exponential(1 / rate, count))
    return [Request(float(at), int(rng.integers(10, 31)), int(rng.choice(rows))) for at in moments]


class _World:
    """Time goes by in calls alone, and in waiting for the next request; all in the engine's thread, of one lane."""

    def __init__(self, coming: Sequence[Request], cost: Callable[[int], float], **options: Any) -> None:
        self.now, self.coming, self.cost = 0.0, list(coming), cost
        self.found: list[float] = [0.0] * len(coming)
        self.begun = self.ended = 0
        self.all_done = threading.Event()
        self.engine = Engine(self.denoise, clock=lambda: self.now, max_queue=len(coming), **options)

    def denoise(self, calls: Sequence[Call], at_once: int = 1) -> list[None]:
        self.now += self.cost(sum(call.rows for call in calls))
        self.arrive()
        return [None] * len(calls)

    def arrive(self) -> None:
        while self.begun < len(self.coming) and self.coming[self.begun].at_s <= self.now:
            index, self.begun = self.begun, self.begun + 1
            self.engine.submit([lambda index=index: self.image(index)])  # type: ignore[misc]

    def image(self, index: int) -> Steps:
        request = self.coming[index]
        for _ in range(request.steps):
            yield Call({}, request.rows)
        self.found[index] = self.now - request.at_s
        self.ended += 1
        if self.ended == len(self.coming):
            self.all_done.set()
        elif self.ended == self.begun:
            self.now = self.coming[self.begun].at_s
            self.arrive()


def latencies(
    policy: Policy, coming: Sequence[Request], cost: Callable[[int], float], max_batch: int = 8
) -> NDArray[np.float64]:
    """Seconds from each request to its image.

    cost: seconds of a call of so many rows.
    """
    world = _World(coming, cost, policy=policy, max_batch=max_batch)
    world.now = coming[0].at_s
    world.arrive()
    try:
        assert world.all_done.wait(WAIT_S)
    finally:
        world.engine.close()
    return np.array(world.found)
