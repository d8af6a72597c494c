"""Writes a graph down as a `Tape`.

recording   the graph on tensors of the `meta` device, which have shapes and share storages but hold nothing:
            kernels write their steps down, views are places in the memory of what they view, other operators are
            calls of torch, oneDNN's among them
planning    what steps write gets a place in one block of memory, the same place where it never lives together
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hqc.program import aten
from hqc.runtimes.integer.cpu import scale_rows
from hqc.runtimes.integer.cpu.attention import attended_like
from hqc.runtimes.integer.cpu.steps import Step, pointers, recording
from hqc.runtimes.integer.cpu.tape import BLOCK, Call, Run, Tape, View
from hqc.runtimes.integer.scales import look_up

__all__ = ["record"]

_ALIGNED = 64
_SLOT = 1 << 40
"""Bytes from one slot to the next in the addresses of a recording, which are below zero."""
_FIRST = 1 << 20
_TAKEN_APART = (aten.reshape.default, aten.contiguous.default)
"""What is a view or a copy by the strides of what it is given."""
_META = torch.device("meta")
_KERNELS: dict[Any, Callable[..., Tensor | None]] = {
    torch.ops.hqc.nearest_timestep.default: scale_rows.nearest,
    look_up: scale_rows.look_up,
}
"""Functions of the graph that are steps where their arguments are as they usually are."""


def record(module: fx.GraphModule, functions: ctypes.CDLL, inputs: Sequence[Tensor]) -> Tape:
    """The tape of a module whose passes are all of the library.

    Raises:
        TypeError: for an operator that cannot be written down. RuntimeError: for one that needs values.
    """
    recorder = _Recorder()
    given = [torch.empty(x.shape, dtype=x.dtype, device=_META) for x in inputs]
    for x in given:
        recorder.slot(x)
    with torch.no_grad():
        output = _Walk(module, recorder).run(*given)
    recorder.slot(output)
    return _tape(functions, recorder, given, output)


def _tape(functions: ctypes.CDLL, recorder: "_Recorder", inputs: Sequence[Tensor], output: Tensor) -> Tape:
    slots = list(recorder.slots.values())
    size = _planned(slots)
    steps, places = recorder.placed_steps()
    done = _done(slots, len(recorder.parts), recorder.slot_of(output).index)
    return Tape(
        functions,
        size,
        steps,
        places.get(BLOCK, (ctypes.c_int64 * 0)()),
        tuple(recorder.placed(part, places, done[i]) for i, part in enumerate(recorder.parts)),
        tuple(recorder.view(x) for x in inputs),
        recorder.view(output),
        tuple(x for x in recorder.keep if not x.is_meta),
        own_threads=not recorder.shares_threads,
    )


@dataclass
class _Slot:
    """The storage of tensors that share one.

    first, last: when it is written and when it is read last, counted in steps and calls; part: the last part that reads
    it. constant: of the module. result: what a call of torch returns, which is not in the block.
    """

    index: int
    bytes: int
    first: int
    last: int
    part: int
    constant: Tensor | None = None
    result: bool = False
    offset: int = 0

    @property
    def memory(self) -> int:
        """Whose memory it is in."""
        return self.index if self.result else BLOCK


@dataclass
class _Recorder:
    """What a walk through the graph writes down."""

    slots: dict[int, _Slot] = field(default_factory=dict)
    parts: list[Run | Call] = field(default_factory=list)
    keep: list[Tensor] = field(default_factory=list)
    shares_threads: bool = False
    _steps: list[Step] = field(default_factory=list)

    def known(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the storage of an earlier one."""
        return _key(tensor) in self.slots

    def slot_of(self, tensor: Tensor) -> _Slot:
        """Where a tensor lies."""
        return self.slots[_key(tensor)]

    def slot(self, tensor: Tensor) -> _Slot:
        """The same, read or written now."""
        key, now, part = _key(tensor), len(self._steps) + len(self.parts), len(self.parts)
        if key not in self.slots:
            self.keep.append(tensor)  # so that no later storage has its key
            self.slots[key] = _Slot(len(self.slots), tensor.untyped_storage().nbytes(), now, now, part)
        found = self.slots[key]
        found.last, found.part = now, part
        return found

    def constant(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor of the module."""
        stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
        self.slot(stand_in).constant = tensor
        self.keep.append(tensor)
        return stand_in

    def address(self, tensor: Tensor) -> int:
        """A real address, or slot and offset."""
        if not tensor.is_meta:
            self.keep.append(tensor)
            return tensor.data_ptr()
        slot, inside = self.slot(tensor), int(tensor.storage_offset()) * tensor.element_size()
        if slot.constant is not None:
            return slot.constant.data_ptr() + inside
        return -(_FIRST + slot.index * _SLOT + inside)

    def step(self, step: Step) -> None:
        """A kernel's."""
        self._steps.append(step)
        last = self.parts[-1] if self.parts else None
        if isinstance(last, Run):
            self.parts[-1] = Run(last.first, last.count + 1)
        else:
            self.parts.append(Run(len(self._steps) - 1, 1))

    def call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], found: Any) -> None:
        """A call of torch, whose tensors are new, or were given to be written.

        Raises:
            TypeError: for a new tensor that does not begin where its storage does.
        """
        for value in tree_leaves([args, kwargs]):
            if isinstance(value, Tensor) and value.is_meta:
                self.slot(value)
        results, before = [], len(self.slots)
        for position, value in enumerate(tree_leaves(found)):
            if isinstance(value, Tensor) and (not self.known(value) or self.slot_of(value).index >= before):
                if self.known(value) or value.storage_offset():
                    raise TypeError(f"{function} returns a part of a tensor of its own")
                self.slot(value).result = True
                results.append((position, value, None))
        self.parts.append(Call(function, tuple(args), dict(kwargs), tuple(results)))

    def view(self, tensor: Tensor) -> View:
        """A tensor as a call finds it; of a result the offset is from its own first number on."""
        slot = self.slot_of(tensor)
        shape, strides, inside = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        if slot.constant is not None:
            constant = slot.constant.as_strided(shape, strides, slot.constant.storage_offset() + inside)
            return View(BLOCK, tensor.dtype, shape, strides, 0, constant)
        if slot.result:
            return View(slot.index, tensor.dtype, shape, strides, inside)
        return View(BLOCK, tensor.dtype, shape, strides, slot.offset // tensor.element_size() + inside)

    def placed(self, part: "Run | Call", places: dict[int, Any], done: tuple[int, ...]) -> "Run | Call":
        """A part with views in the place of tensors."""
        if isinstance(part, Run):
            return Run(part.first, part.count, done)

        def placed(value: Any) -> Any:
            return self.view(value) if isinstance(value, Tensor) and value.is_meta else value

        args, kwargs = tree_map(placed, (part.args, part.kwargs))
        results = []
        for position, tensor, _ in part.results:
            view = self.view(tensor)
            results.append((position, view, places.get(view.memory)))
        return Call(part.function, args, kwargs, tuple(results), done)

    def placed_steps(self) -> tuple[Any, dict[int, Any]]:
        """The steps with places in the memory of a call; where in them these stand, in bytes, by whose memory it is."""
        slots, found = list(self.slots.values()), dict[int, list[int]]()
        for index, step in enumerate(self._steps):
            for offset in pointers(step):
                value = ctypes.c_int64.from_buffer(step, offset)
                if value.value < 0:
                    number, inside = divmod(-value.value - _FIRST, _SLOT)
                    value.value = slots[number].offset + inside
                    found.setdefault(slots[number].memory, []).append(index * ctypes.sizeof(Step) + offset)
        places = {memory: (ctypes.c_int64 * len(offsets))(*offsets) for memory, offsets in found.items()}
        return (Step * len(self._steps))(*self._steps), places


class _Walk(fx.Interpreter):
    """Runs a graph on tensors that hold nothing."""

    def __init__(self, module: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._recorder = recorder
        self._constants: dict[str, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        """A constant's stand-in."""
        if target not in self._constants:
            self._constants[target] = self._recorder.constant(super().get_attr(target, args, kwargs))
        return self._constants[target]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Kernels write their steps down, and torch's operators before and after them."""
        with _Operators(self._recorder), recording(self._recorder):
            return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A view, a kernel, or a call of torch."""
        if target in _KERNELS:
            with recording(self._recorder):
                found = _KERNELS[target](*args)
            if found is not None:
                return found
        if target in _TAKEN_APART:
            with _Operators(self._recorder):
                return target(*args, **kwargs)
        if not isinstance(target, torch._ops.OpOverload) and not callable(target):
            return super().call_function(target, args, kwargs)
        found = _on_meta(target, args, kwargs)
        if any(isinstance(x, Tensor) and not self._recorder.known(x) for x in tree_leaves(found)):
            self._recorder.call(target, args, kwargs, found)
        return found


def _on_meta(target: Any, args: Any, kwargs: Any) -> Any:
    """What a function gives of such tensors."""
    if target is aten.scaled_dot_product_attention.default:
        return attended_like(args[0], args[2])
    args, kwargs = tree_map(lambda v: _META if isinstance(v, torch.device) else v, (args, kwargs))
    return target(*args, **kwargs)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down torch's operators within a module, views aside."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs and writes one down."""
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        given = {_key(x) for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor) and x.is_meta}
        new = any(isinstance(x, Tensor) and _key(x) not in given for x in tree_leaves(found))
        if given and (new or function._schema.is_mutable):
            self._recorder.call(function, args, kwargs, found)
        return found


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _planned(slots: Sequence[_Slot]) -> int:
    """Gives what is in the block its offset, large ones first, each at the lowest free place of its time; the bytes."""
    placed: list[_Slot] = []
    for slot in sorted((s for s in slots if s.constant is None and not s.result), key=lambda s: -s.bytes):
        beside = sorted((s for s in placed if s.first <= slot.last and slot.first <= s.last), key=lambda s: s.offset)
        for other in beside:
            if slot.offset + slot.bytes <= other.offset:
                break
            slot.offset = max(slot.offset, _aligned(other.offset + other.bytes))
        placed.append(slot)
    return _aligned(max((s.offset + s.bytes for s in placed), default=0))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _done(slots: Sequence[_Slot], parts: int, output: int) -> list[tuple[int, ...]]:
    """After every part, the results that nobody reads from then on."""
    found: list[list[int]] = [[] for _ in range(parts + 1)]
    for slot in slots:
        if slot.result and slot.index != output:
            found[slot.part].append(slot.index)
    return [tuple(indices) for indices in found]
