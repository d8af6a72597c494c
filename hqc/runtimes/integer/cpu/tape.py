"""A graph for one shape of its inputs, as `recorder` wrote it down, run without Python between its kernels.

    a call      a block of memory, its address added to the pointers of the steps, inputs copied in; then runs of steps
                and calls of torch in turns, the pointers to what these return added where it is there; the output

A tape holds no memory of a call: several threads may run it at the same time.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hqc.runtimes.integer.cpu.steps import Step

__all__ = ["BLOCK", "Call", "Run", "Tape", "View"]

BLOCK = -1
"""In the place of a call's number: the block."""


@dataclass(frozen=True)
class View:
    """A tensor in the memory of a call, or of the module; offset in its own numbers."""

    memory: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    constant: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """function(*args, **kwargs) and what it returns.

    results: (place in what it returns, the tensor as the tape has it, the places that point there). done: what nobody
    reads from then on.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[tuple[int, Any, Any], ...]
    done: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """Steps from `first` on, without Python between them."""

    first: int
    count: int
    done: tuple[int, ...] = ()


class _Memory:
    """Of one call: the block and what torch returned."""

    def __init__(self, size: int) -> None:
        block = torch.empty(size, dtype=torch.uint8)
        self.address = block.data_ptr()
        self._block = {torch.uint8: block}
        self.results: dict[int, Tensor] = {}

    def __getitem__(self, view: View) -> Tensor:
        if view.constant is not None:
            return view.constant
        if view.memory != BLOCK:
            result = self.results[view.memory]
            if result.shape == view.shape and result.stride() == view.strides and not view.offset:
                return result
            return result.as_strided(view.shape, view.strides, result.storage_offset() + view.offset)
        if view.dtype not in self._block:
            self._block[view.dtype] = self._block[torch.uint8].view(view.dtype)
        return self._block[view.dtype].as_strided(view.shape, view.strides, view.offset)

    def fill(self, value: Any) -> Any:
        """A value with tensors in the place of views, in lists too."""
        if isinstance(value, View):
            return self[value]
        return [self.fill(v) for v in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Tape:
    """module(*inputs), for inputs of one shape.

    bytes: the block of a call. steps: with places in the memory of a call, `places` where they are the block's. keep:
    what steps point at. own_threads: see `team.h`.
    """

    functions: ctypes.CDLL
    bytes: int
    steps: Any
    places: Any
    parts: tuple[Run | Call, ...]
    inputs: tuple[View, ...]
    output: View
    keep: tuple[Tensor, ...]
    own_threads: bool

    @property
    def calls(self) -> int:
        """How many calls of torch run."""
        return sum(isinstance(part, Call) for part in self.parts)

    def apart(self) -> "Tape":
        """The same with every step a part of its own."""
        parts: list[Run | Call] = []
        for part in self.parts:
            if isinstance(part, Run):
                parts += [Run(part.first + i, 1) for i in range(part.count - 1)]
                part = Run(part.first + part.count - 1, 1, part.done)
            parts.append(part)
        return replace(self, parts=tuple(parts))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output, in memory of its own."""
        return self.play(inputs)

    def play(self, inputs: Sequence[Tensor], after: Callable[[], None] = lambda: None) -> Tensor:
        """The output, in memory of its own. after: called behind every part."""
        memory, threads = _Memory(self.bytes), torch.get_num_threads()
        steps = type(self.steps).from_buffer_copy(self.steps)
        where = ctypes.addressof(steps)
        self.functions.hqc_move(where, self.places, len(self.places), memory.address)
        for view, given in zip(self.inputs, inputs, strict=True):
            memory[view].copy_(given)
        for part in self.parts:
            if isinstance(part, Run):
                self.functions.hqc_run(where + part.first * ctypes.sizeof(Step), part.count, threads, self.own_threads)
            else:
                self._call(part, memory, where)
            for index in part.done:
                memory.results.pop(index, None)
            after()
        return memory[self.output].clone()

    def _call(self, call: Call, memory: _Memory, steps: int) -> None:
        kwargs = {name: memory.fill(value) for name, value in call.kwargs.items()}
        found = call.function(*memory.fill(call.args), **kwargs)
        leaves = (found,) if isinstance(found, Tensor) else tree_leaves(found)
        for position, view, places in call.results:
            result = leaves[position]
            if result.stride() != view.strides:
                result = torch.empty_strided(view.shape, view.strides, dtype=view.dtype).copy_(result)
            memory.results[view.memory] = result
            if places is not None:
                self.functions.hqc_move(steps, places, len(places), result.data_ptr())
