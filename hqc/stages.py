"""What goes on now: long work says its stage here, and the command line prints a line of it now and then.

    [ 10 s] lowering for tensorrt
    [ 20 s] compiling kernels: 12 of 35, int_gemm_fp16

At most one every ten seconds, the first after ten: quick commands print nothing, and a refusal stays one line.
`HQC_PROGRESS=0` turns it off. Lines go to standard error; where a bar is drawn for a stage, its lines are left out.
Importing this loads nothing heavy.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Reporter", "Stage", "doing", "each", "reported", "time_left"]

_Item = TypeVar("_Item")

EVERY = 10.0
_LONGEST = 100
_WAIT = 0.5


@dataclass(eq=False)
class Stage:
    """A stage of long work: what, how far of how much (0: nobody knows), and whether a bar shows it already."""

    what: str
    done: int = 0
    total: int = 0
    note: str = ""
    drawn: bool = False

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Says how far it is."""
        self.done, self.total, self.note = done, total, note

    def __str__(self) -> str:
        counted = f": {self.done} of {self.total}" if self.total else ""
        note = f", {self.note}" if self.note else ""
        text = " ".join(f"{self.what}{counted}{note}".split())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


_stages: list[Stage] = []


@contextmanager
def doing(what: str, *, drawn: bool = False) -> Iterator[Stage]:
    """Within it `what` goes on; the stage that it yields takes (done, total, note)."""
    stage = Stage(what, drawn=drawn)
    _stages.append(stage)
    try:
        yield stage
    finally:
        _stages.remove(stage)


def each(what: str, items: Sequence[_Item], size: Callable[[_Item], float] = lambda item: 1.0) -> Iterator[_Item]:
    """The items in turn, while `what` goes on: how many are done, and how long the others take by their `size`."""
    left, done, began = sum(map(size, items)), 0.0, time.perf_counter()
    with doing(what) as stage:
        for number, item in enumerate(items):
            stage(number, len(items), time_left(time.perf_counter() - began, done, left))
            yield item
            done, left = done + size(item), left - size(item)


def time_left(seconds: float, done: float, left: float) -> str:
    """How long what is left takes at the pace of what is done; nothing before any is."""
    if not done:
        return ""
    rest = seconds / done * left
    return f"{rest / 60:.0f} min left" if rest >= 90 else f"{rest:.0f} s left"


class Reporter:
    """Decides when a stage is worth a line."""

    def __init__(self, now: float) -> None:
        self._start = self._last = now

    def line(self, now: float, stage: Stage | None) -> str | None:
        """The line to print now, if any."""
        if stage is None or stage.drawn or now - self._last < EVERY:
            return None
        self._last = now
        return f"[{now - self._start:3.0f} s] {stage}"


@contextmanager
def reported(write: Callable[[str], object] | None = None) -> Iterator[None]:
    """Within it lines are written, by a thread: work that comes to no end has no time to. write: default stderr."""
    if os.environ.get("HQC_PROGRESS") == "0":
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_report, args=(over, write or _to_stderr), name="hqc-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _report(over: threading.Event, write: Callable[[str], object]) -> None:
    reporter = Reporter(time.monotonic())
    while not over.wait(_WAIT):
        line = reporter.line(time.monotonic(), next(iter(_stages[-1:]), None))
        if line is not None:
            write(line)


def _to_stderr(line: str) -> None:
    """A reader that has gone away is no reason to stop."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return
