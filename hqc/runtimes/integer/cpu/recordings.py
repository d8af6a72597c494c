"""The tapes of a module, one for each shape of its inputs that it met; the last `MOST` are kept."""

import ctypes
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

from torch import Tensor, fx

from hqc.runtimes.integer.cpu.recorder import record
from hqc.runtimes.integer.cpu.tape import Tape

__all__ = ["MOST", "Recordings"]

log = logging.getLogger(__name__)

MOST = 64
"""Shapes whose tapes are kept: a server calls with many numbers of rows in turn, and a tape has some 100 KB."""


@dataclass
class _Shape:
    """What is known of one shape; found: its tape, why there is none, or None before it was tried."""

    lock: Lock = field(default_factory=Lock)
    found: Tape | str | None = None


class Recordings:
    """Tapes of a module, each recorded at the first call with its shape; other shapes do not wait meanwhile."""

    def __init__(self, module: fx.GraphModule, functions: ctypes.CDLL) -> None:
        """functions: the library of all its passes and products."""
        self._module, self._functions = module, functions
        self._shapes: OrderedDict[tuple[object, ...], _Shape] = OrderedDict()
        self._lock = Lock()

    def tape(self, inputs: Sequence[Tensor]) -> Tape | None:
        """Of the shapes of some inputs; None if calls with them cannot be recorded."""
        found = self._tried(inputs)
        return None if isinstance(found, str) else found

    def reason_against(self, inputs: Sequence[Tensor]) -> str:
        """Why calls cannot be recorded, tried with these inputs; "" if they can."""
        found = self._tried(inputs)
        return found if isinstance(found, str) else ""

    def _tried(self, inputs: Sequence[Tensor]) -> Tape | str:
        shape = self._shape(tuple((tuple(x.shape), x.dtype) for x in inputs))
        with shape.lock:
            if shape.found is None:
                shape.found = self._recorded(inputs)
            return shape.found

    def _shape(self, key: tuple[object, ...]) -> _Shape:
        """That of a key, as the last one used."""
        with self._lock:
            found = self._shapes.setdefault(key, _Shape())
            self._shapes.move_to_end(key)
            while len(self._shapes) > MOST:
                self._shapes.popitem(last=False)
            return found

    def _recorded(self, inputs: Sequence[Tensor]) -> Tape | str:
        try:
            return record(self._module, self._functions, inputs)
        except Exception as error:  # whatever an operator raises: it needs values, or writes its input
            why = " ".join(str(error).split())[:120] or type(error).__name__
            log.info("calls with %s run node by node: %s", [tuple(x.shape) for x in inputs], why)
            return why
