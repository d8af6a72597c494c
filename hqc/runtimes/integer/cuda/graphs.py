"""One CUDA graph a batch size: static inputs, one capture, replays; the least recently used is dropped.

Scales are looked up inside the graph from its own `timestep` input, so that one capture serves every timestep and
batches of mixed ones.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["GRAPHS", "WARM_UP", "Capture", "Captured", "GraphCache", "Module", "capture_cuda_graph"]

WARM_UP = 3
"""Calls before a capture: they compile kernels, choose algorithms, fill the allocator."""

GRAPHS = 8
"""Batch sizes that keep their graph: every power of two up to 128, which is what the server asks for."""

Module = Callable[..., Tensor]


@dataclass(frozen=True)
class Captured:
    """A captured call: `replay` computes `output` from what `inputs` hold, all at fixed addresses."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], None]


Capture = Callable[[Module, tuple[Tensor, ...]], Captured]


def capture_cuda_graph(module: Module, inputs: tuple[Tensor, ...], *, pool: Any = None) -> Captured:
    """Captures module(*inputs) on a side stream after a warm-up; `inputs` become the static ones.

    pool: of memory that several graphs share. That is safe where they run one after the other and each output is
    copied away before the next: a replay writes whatever it reads.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad(), _best_algorithms():
        for _ in range(WARM_UP):
            module(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Another thread's allocation is no part of this capture and must not end it.
    recording = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    with torch.no_grad(), _best_algorithms(), recording:
        output = module(*inputs)
    return Captured(inputs, output, graph.replay)


@contextmanager
def _best_algorithms() -> Iterator[None]:
    """cuDNN tries its algorithms for each shape during the warm-up; the capture then takes the quickest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class GraphCache:
    """module(*inputs) through captures, one for each set of shapes, at most `limit` of them kept."""

    def __init__(self, module: Module, capture: Capture, *, limit: int = GRAPHS) -> None:
        self._module, self._capture, self._limit = module, capture, limit
        self._captured: OrderedDict[tuple[tuple[int, ...], ...], Captured] = OrderedDict()

    @property
    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Those that are captured, the least recently used first."""
        return tuple(self._captured)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The module's output in memory of its own: the next call does not change it."""
        key = tuple(tuple(tensor.shape) for tensor in inputs)
        if key in self._captured:
            self._captured.move_to_end(key)
            found = self._captured[key]
            for static, given in zip(found.inputs, inputs, strict=True):
                static.copy_(given)
        else:
            while len(self._captured) >= self._limit:
                self._captured.popitem(last=False)
            found = self._capture(self._module, tuple(tensor.clone() for tensor in inputs))
            self._captured[key] = found
        found.replay()
        return found.output.clone()
