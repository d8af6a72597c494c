"""Standard output that says when it cannot be written."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hqc.errors import HqcError

__all__ = ["OutputError", "checked_stdout"]


class OutputError(HqcError):
    """Standard output cannot be written."""


class _Checked:
    """Standard output whose errors say what they are of."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._error: OutputError | None = None  # the first error stays: a library may have swallowed it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._checked(lambda: self._stream.write(text))  # type: ignore[no-any-return]

    def flush(self) -> None:
        self._checked(self._stream.flush)

    def _checked(self, call: Callable[[], Any]) -> Any:
        if self._error is not None:
            raise self._error
        try:
            return call()
        except BrokenPipeError:
            raise  # the reader has seen enough
        except OSError as error:
            with suppress(OSError, ValueError):  # what is left in buffers goes nowhere when the interpreter ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            found = f"cannot be written ({error.strerror or error})"
            self._error = OutputError("standard output", found, "Free some space or choose another place.")
            raise self._error from error


@contextmanager
def checked_stdout() -> Iterator[None]:
    """Inside, what cannot be printed is an `OutputError`: a full disk behind a redirection, for one."""
    before, sys.stdout = sys.stdout, _Checked(sys.stdout)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout = before
