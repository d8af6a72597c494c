"""The timer of `tune` on a CUDA device: CUDA graphs of calls whose weights are not in the second-level cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hqc.errors import HqcError
from hqc.kernels.calls import Call, Work
from hqc.kernels.precompile import Compilers, answer, compilers, instead_of_launching
from hqc.kernels.products import Product, ProductTile
from hqc.kernels.tuning import force

__all__ = ["CudaTimer", "cuda_timer", "equal_bits"]

_CALLS = (8, 32)
"""Of a graph, at least and at most: each with a copy of the weight, together larger than the cache if they can be."""
_COPIES_BYTES = 2 << 30
_ROUNDS = 5
_ROUND_SECONDS = 1e-3
"""Of a tile in a round, at least."""
_WARM_SECONDS = 0.3


class CudaTimer:
    """Compiles ahead in other processes; times the tiles of a product in turns, the median of five rounds."""

    def __init__(self, device: torch.device, workers: Compilers) -> None:
        self._device, self._workers = device, workers
        self._compiled: dict[tuple[Product, ProductTile], list[Future[str]]] = {}
        self._warm = False

    def prepare(self, work: Work, tiles: Sequence[ProductTile]) -> None:
        """Begins to compile."""
        call = work.call.empty(self._device)
        for tile in tiles:
            with force(tile), instead_of_launching() as jobs:
                try:
                    call.run()
                except HqcError:
                    continue  # `time` meets it again, and says so
            self._compiled[work.product, tile] = [self._workers.submit(job) for job in jobs]

    @torch.no_grad()
    def time(self, work: Work, tiles: Sequence[ProductTile]) -> list[float | str]:
        """See `Timer`."""
        call = work.call.random(self._device)
        wanted = None
        answers = list[float | str]()
        usable = list[ProductTile]()
        for tile in tiles:
            reason, result = self._first_run(work, call, tile)
            if not reason and wanted is None:
                wanted = result
            elif not reason and not equal_bits(wanted, result):
                reason = "it gives other bits than the first tile; not used, please report it"
            answers.append(reason or 0.0)
            if not reason:
                usable.append(tile)
        times = iter(self._times(call, usable))
        return [reason or next(times) for reason in answers]

    def _first_run(self, work: Work, call: Call, tile: ProductTile) -> tuple[str, Any]:
        for future in self._compiled.pop((work.product, tile), ()):
            if reason := answer(future):
                return reason, None
        try:
            with force(tile):
                result = call.run()
            torch.cuda.synchronize(self._device)
        except torch.cuda.OutOfMemoryError:
            return "there is not enough GPU memory", None
        except Exception as error:  # triton's OutOfResources and what a launch raises
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return lines[0], None
        return "", result

    def _times(self, call: Call, tiles: Sequence[ProductTile]) -> list[float]:
        """Microseconds of a call in each tile."""
        size = max(1, call.weight_bytes())
        cache = getattr(torch.cuda.get_device_properties(self._device), "L2_cache_size", 0) or 64 << 20
        most = max(2, min(_CALLS[1], _COPIES_BYTES // size))
        count = min(most, max(_CALLS[0], math.ceil(1.5 * cache / size)))
        copies = [call, *(call.with_other_weight() for _ in range(count - 1))]
        pool = torch.cuda.graph_pool_handle()
        graphs = [self._captured(copies, tile, pool) for tile in tiles]
        if not self._warm and graphs:
            _measure(graphs[0].replay, _WARM_SECONDS)
            self._warm = True
        rounds = [[_measure(graph.replay, _ROUND_SECONDS) / count for graph in graphs] for _ in range(_ROUNDS)]
        return [1e6 * median(times) for times in zip(*rounds, strict=True)]

    def _captured(self, copies: Sequence[Call], tile: ProductTile, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # The graphs share memory: they run one after the other, and nobody reads what they write.
        recording = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
        with force(tile), recording:
            for copy in copies:
                copy.run()
        return graph


def _measure(replay: Callable[[], None], seconds: float) -> float:
    """Seconds of a replay: of one, or the mean of as many as fill the time."""
    count = max(1, round(seconds / max(1e-6, _replays(replay, 1))))
    return _replays(replay, count)


def _replays(replay: Callable[[], None], count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(count):
        replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / count


def equal_bits(wanted: Any, result: Any) -> bool:
    """Whether two results of a product are the same; of several tensors the first, as statistics depend on the tile."""
    first, second = (r if isinstance(r, Tensor) else r[0] for r in (wanted, result))
    return torch.equal(_bits(first), _bits(second))


def _bits(tensor: Tensor) -> Tensor:
    """As integers, so that NaN equals itself and -0 does not equal 0."""
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


@contextmanager
def cuda_timer(device: torch.device) -> Iterator[CudaTimer]:
    """A timer with its processes."""
    with compilers() as workers:
        yield CudaTimer(device, workers)
