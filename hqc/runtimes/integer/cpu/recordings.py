"""The tapes of a module, one for each shape of its inputs that it met; the last `MOST` are kept."""

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from torch import Tensor, fx

from hqc.runtimes.integer.cpu.recorder import record
from hqc.runtimes.integer.cpu.tape import Tape

__all__ = ["MOST", "Recordings"]

MOST = 8
"""Shapes whose tapes are kept."""


class Recordings:
    """module(*inputs) by tapes."""

    def __init__(self, module: fx.GraphModule, functions: ctypes.CDLL) -> None:
        """functions: the library of all its passes and products."""
        self._module, self._functions = module, functions
        self._tapes: OrderedDict[tuple[object, ...], Tape] = OrderedDict()
        self._lock = Lock()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output; the first call with a shape records it."""
        return self.tape(inputs)(*inputs)

    def reason_against(self, inputs: Sequence[Tensor]) -> str:
        """Why calls cannot be recorded, tried with these inputs, whose tape is kept; "" if they can."""
        try:
            self.tape(inputs)
        except (RuntimeError, NotImplementedError, TypeError) as error:  # it needs values, or writes its input
            return " ".join(str(error).split())[:120]
        return ""

    def tape(self, inputs: Sequence[Tensor]) -> Tape:
        """Of the shapes of some inputs."""
        key = tuple((tuple(x.shape), x.dtype) for x in inputs)
        with self._lock:
            if key not in self._tapes:
                self._tapes[key] = record(self._module, self._functions, inputs)
            self._tapes.move_to_end(key)
            while len(self._tapes) > MOST:
                self._tapes.popitem(last=False)
            return self._tapes[key]
