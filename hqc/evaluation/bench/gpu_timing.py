"""Timing on a GPU that can be trusted: a warm card, calls inside CUDA graphs, contenders in turns, medians with spread.

A card that idles lowers its clocks, a launch takes longer than a small kernel, and what lies in the L2 cache is not
read from memory. So every figure starts with `spin_up`, many calls make one graph, and `Rotation` gives each call
another copy of its weights, together more than the cache holds.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Measured", "Rotation", "cache_bytes", "capture", "interleaved", "quartiles", "spin_up"]

SPIN_SECONDS, TURN_SECONDS = 0.3, 0.001
"""Of work before a contest, and before each turn in it."""
USUAL_CACHE = 50 * 2**20
"""Bytes of an H100's L2, where torch does not say."""
_SPIN_SIDE = 2048

Call = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """Microseconds of one call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """As JSON data."""
        return {"us": self.median, "us_low": self.low, "us_high": self.high}


def quartiles(values: Sequence[float]) -> Measured:
    """Of one or more values.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    Measured(median=3.0, low=2.0, high=4.0)
    """
    low, high = (float(value) for value in np.percentile(values, (25, 75)))
    return Measured(statistics.median(values), low, high)


def spin_up(seconds: float = SPIN_SECONDS) -> None:
    """Keeps the card busy with float16 products, until its clocks are up."""
    a = torch.ones(_SPIN_SIDE, _SPIN_SIDE, device="cuda", dtype=torch.float16)
    out, end = torch.empty_like(a), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            torch.mm(a, a, out=out)
        torch.cuda.synchronize()


def cache_bytes() -> int:
    """Of the current device's L2 cache."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "L2_cache_size", 0) or USUAL_CACHE)


@dataclass(frozen=True)
class Rotation:
    """How many calls a graph holds, and how many copies of what a call reads are taken in turn."""

    calls: int
    copies: int

    @classmethod
    def over(cls, call_bytes: int, cache: int, *, least: int = 8, most: int = 24) -> "Rotation":
        """Copies of together twice the cache, as far as `most` calls reach; never fewer than `least` calls.

        >>> Rotation.over(10_000_000, 50_000_000), Rotation.over(100_000, 50_000_000), Rotation.over(10**9, 10**7)
        (Rotation(calls=10, copies=10), Rotation(calls=24, copies=24), Rotation(calls=8, copies=2))
        """
        copies = max(2, min(most, -(-2 * cache // max(call_bytes, 1))))
        return cls(max(least, copies), copies)


def capture(calls: Sequence[Call], times: int) -> Call:
    """A CUDA graph of `times` calls, taken from `calls` in turn; returns its replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for call in (calls[0], *calls):  # compiles, chooses algorithms
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        kept = [calls[i % len(calls)]() for i in range(times)]

    def replay() -> None:
        graph.replay()
        _ = calls, kept  # what the graph reads and writes lives as long as it

    return replay


def interleaved(
    replays: Mapping[str, Call],
    calls: Mapping[str, int],
    *,
    rounds: int = 9,
    spin_seconds: float = SPIN_SECONDS,
    clock: Callable[[Call], float] | None = None,
    spin: Callable[[float], None] = spin_up,
) -> dict[str, Measured]:
    """Microseconds of one call of every contender: in turns, the first of a round being the next one each time.

    replays: a graph each. calls: how many calls it holds. The card is spun up first, and a little before every turn.
    """
    names, times = list(replays), {name: list[float]() for name in replays}
    read = clock or _event_microseconds
    spin(spin_seconds)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            spin(TURN_SECONDS)
            took = read(replays[name]) / calls[name]
            if turn:
                times[name].append(took)
    return {name: quartiles(values) for name, values in times.items()}


def _event_microseconds(replay: Call) -> float:
    """Of one replay, by events on the stream; one before it fills caches and queue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    replay()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end))
