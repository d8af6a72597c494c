"""What goes on now: long work says its stage here, and the command line prints a line of it now and then.

    [ 10 s] lowering for tensorrt
    [ 20 s] compiling kernels: 12 of 35, 19 s left, int_gemm_fp16

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

__all__ = ["Reporter", "Stage", "doing", "each", "reported"]

_Item = TypeVar("_Item")

EVERY = 10.0
_LONGEST = 100
_WAIT = 0.5


@dataclass(eq=False)
class Stage:
    """A stage of long work: what, how far of how much (0: nobody knows), and whether a bar shows it already.

    How long the rest takes is said at the pace since some of it was done first: work that goes on where it was killed
    starts far.
    """

    what: str
    done: int = 0
    total: int = 0
    note: str = ""
    drawn: bool = False
    left: str = ""
    _first: tuple[float, float] = (0.0, 0.0)

    def __call__(self, done: int, total: int, note: str = "", share: float | None = None) -> None:
        """Says how far it is. share: of the work, where what is counted differs in size."""
        share = done / total if share is None and total else share or 0.0
        now = time.perf_counter()
        if not self._first[1] or total != self.total:
            self._first = now, share
        self.left = _left(now - self._first[0], share - self._first[1], 1 - share)
        self.done, self.total, self.note = done, total, note

    def __str__(self) -> str:
        counted = f": {self.done} of {self.total}" if self.total else ""
        rest = "".join(f", {text}" for text in (self.left, self.note) if text)
        text = " ".join(f"{self.what}{counted}{rest}".split())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _left(seconds: float, done: float, left: float) -> str:
    """How long what is left takes at the pace of what is done; nothing before any is, nor for less than a second."""
    rest = seconds / done * left if done > 0 else 0.0
    if rest < 1:
        return ""
    return f"{rest / 60:.0f} min left" if rest >= 90 else f"{rest:.0f} s left"


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
    """The items in turn, while `what` goes on; each is so much of the work as its size."""
    whole, done = sum(map(size, items)), 0.0
    with doing(what) as stage:
        for number, item in enumerate(items):
            stage(number, len(items), share=done / whole if whole else None)
            yield item
            done += size(item)


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
