"""One call of a kernel as data, the fields of `steps.h`: run at once, or written down by a recording.

While a recording is made on a thread, tensors on the `meta` device stand for what a call will hold: a step then has
places in the memory of a call for addresses.
"""

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from hqc.errors import KernelError

__all__ = [
    "Recorder",
    "Step",
    "address",
    "load_steps",
    "pointers",
    "recorder",
    "recording",
    "run_step",
    "step_fields",
    "step_of",
    "whole_numbers",
]

_Pointer, _Size, _Double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_Pair = _Size * 2


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class QuantiserFields(ctypes.Structure):
    """How a tensor becomes codes."""

    _fields_ = (*_fields(_Pointer, "inverse low high"), *_fields(_Size, "pitch bound_pitch block regular"))


class RowsFields(ctypes.Structure):
    """Rows of one tensor, or of two side by side."""

    _fields_ = (
        *_fields(_Pointer, "x second"),
        *_fields(_Size, "first pitch second_pitch channels samples pixels"),
    )


class Quantise(ctypes.Structure):
    """Rotation and rounding."""

    _fields_ = (("rows", RowsFields), ("quantiser", QuantiserFields), ("codes", _Pointer))


class GroupNormFields(ctypes.Structure):
    """Group norm and SiLU."""

    _fields_ = (
        ("rows", RowsFields),
        *_fields(QuantiserFields, "quantiser beside_quantiser"),
        *_fields(_Pointer, "weight bias codes floats beside"),
        *_fields(_Size, "groups silu"),
        ("eps", _Double),
    )


class LayerNormFields(ctypes.Structure):
    """Layer norm."""

    _fields_ = (
        ("rows", RowsFields),
        ("quantiser", QuantiserFields),
        *_fields(_Pointer, "weight bias codes floats"),
        ("eps", _Double),
    )


class Gate(ctypes.Structure):
    """An activation, of half the channels or of all."""

    _fields_ = (
        ("rows", RowsFields),
        ("quantiser", QuantiserFields),
        ("codes", _Pointer),
        *_fields(_Size, "kind gated"),
    )


class Product(ctypes.Structure):
    """A product of codes with what follows it."""

    _fields_ = (
        *_fields(_Pointer, "codes weight offset scale factor bias shift residual y"),
        *_fields(_Size, "factor_pitch shift_pitch samples height width channels outputs"),
        *_fields(_Pair, "kernel stride padding dilation size"),
        *_fields(_Size, "upsample zero group add silu"),
    )


class Attention(ctypes.Structure):
    """Attention of every head."""

    _fields_ = (
        *_fields(_Pointer, "q k v y"),
        *_fields(_Size, "samples heads queries keys depth width"),
        *_fields(_Size * 3, "q_pitch k_pitch v_pitch"),
        ("scale", _Double),
    )


class Nearest(ctypes.Structure):
    """`hqc::nearest_timestep`."""

    _fields_ = (*_fields(_Pointer, "timestep grid rows"), *_fields(_Size, "samples count"))


class LookUp(ctypes.Structure):
    """`scales.look_up`."""

    _fields_ = (*_fields(_Pointer, "bank rows y"), *_fields(_Size, "tables length width samples pitch"))


class _Union(ctypes.Union):
    _fields_ = (
        ("quantise", Quantise),
        ("group_norm", GroupNormFields),
        ("layer_norm", LayerNormFields),
        ("gate", Gate),
        ("product", Product),
        ("attention", Attention),
        ("nearest", Nearest),
        ("look_up", LookUp),
    )


class Step(ctypes.Structure):
    """A kind and its fields."""

    _fields_ = (("kind", _Size), ("fields", _Union))


class Recorder(Protocol):
    """What writes steps down instead of running them.

    shares_threads: whether there are calls that OpenMP's threads have much to do in.
    """

    shares_threads: bool

    def address(self, tensor: Tensor) -> int:
        """What stands for the address of a tensor."""
        ...

    def step(self, step: Step) -> None:
        """The next step."""
        ...

    def call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], found: Any) -> None:
        """The next call of anything else, with what stands for its result."""
        ...


class _Current(threading.local):
    recorder: Recorder | None = None


_current = _Current()


@contextmanager
def recording(taker: Recorder) -> Iterator[None]:
    """Steps of this thread are written down meanwhile."""
    _current.recorder = taker
    try:
        yield
    finally:
        _current.recorder = None


def recorder() -> Recorder | None:
    """That of this thread."""
    return _current.recorder


def load_steps(functions: ctypes.CDLL) -> ctypes.CDLL:
    """A library with its functions' types.

    Raises:
        KernelError: if its steps are not those of this file.
    """
    functions.hqc_step_size.restype = _Size
    if functions.hqc_step_size() != ctypes.sizeof(Step):
        found, expected = functions.hqc_step_size(), ctypes.sizeof(Step)
        raise KernelError("passes.so", f"a step has {found} bytes, expected {expected}", "Delete it: it is made again.")
    functions.hqc_run.argtypes, functions.hqc_run.restype = [_Pointer, _Size, ctypes.c_int, ctypes.c_int], None
    functions.hqc_move.argtypes, functions.hqc_move.restype = [_Pointer, _Pointer, _Size, _Size], None
    return functions


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor begins."""
    if tensor is None:
        return None
    return tensor.data_ptr() if _current.recorder is None else _current.recorder.address(tensor)


def whole_numbers(numbers: Sequence[int]) -> Any:
    """Two or three as a field."""
    return (_Size * len(numbers))(*numbers)


def pointers(step: Step) -> list[int]:
    """Where a step's addresses lie, in bytes from its beginning."""
    _, kind = _Union._fields_[step.kind]
    return [Step.fields.offset + offset for offset in _pointers_of(kind)]


@cache
def _pointers_of(kind: type[ctypes.Structure]) -> list[int]:
    found = []
    for name, field, *_ in kind._fields_:
        offset: int = getattr(kind, name).offset
        if field is _Pointer:
            found.append(offset)
        elif issubclass(field, ctypes.Structure):
            found += [offset + inner for inner in _pointers_of(field)]
    return found


def step_of(fields: ctypes.Structure) -> Step:
    """The step of its fields."""
    kinds: list[type[ctypes.Structure]] = [kind for _, kind in _Union._fields_]
    step = Step(kinds.index(type(fields)))
    setattr(step.fields, _Union._fields_[step.kind][0], fields)
    return step


def step_fields(step: Step) -> Any:
    """The fields of its kind."""
    return getattr(step.fields, _Union._fields_[step.kind][0])


def run_step(functions: ctypes.CDLL, fields: ctypes.Structure) -> None:
    """Runs a kernel, or writes it down; whoever calls keeps alive what the fields point at."""
    step = step_of(fields)
    if _current.recorder is not None:
        _current.recorder.step(step)
        return
    functions.hqc_run(ctypes.byref(step), 1, torch.get_num_threads(), False)
