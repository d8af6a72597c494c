"""How many images share calls of the denoiser: as many as pay, by what the engine's own steps have cost.

A step of an image takes τ seconds, from where it wants a call to where it wants the next, with the call of everyone
beside it and its scheduler. Of r rows under way in L lanes

    τ = fixed + each · max(1, r / L)

so that k images draw k/τ(k) steps a second. Where `fixed` is nothing, sharing draws no more: it only lets all end late
that could have ended one after the other. The n images that are there, in groups of k, end after (n/k + 1)·τ(k)/2 a
step on average, and another one beside the k that share is worth it for them if

    n · (τ(k)/k - τ(k+1)/(k+1)) > τ(k+1) - τ(k)        (of one row an image and lane: n · fixed > k(k+1) · each)

A line that is longer foretells more arrivals, which gain from every step that is drawn sooner but lose nothing yet: n²
stands for n. So a batch grows with the line, to the most where `fixed` counts for anything at all.
"""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from hqc.serving.tickets import Call, Task

__all__ = ["Cost", "Sharing", "StepTimes", "pays"]

_ENOUGH = 3  # steps of a size before it tells anything
_KEPT = 15  # of a size; their median is its time
_AT_ONCE, _EVERY = 100, 16  # the line is drawn after each of the first hundred steps, then after every sixteenth
_REMEMBERED_S, _REMEMBERED_STEPS = 300, 1000
# A size that is not seen for so long is forgotten: a machine changes, and what does not pay is not tried otherwise.


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by rows a lane: fixed + each · rows."""

    fixed: float
    each: float

    def of(self, rows: float) -> float:
        """Of so many rows a lane."""
        return self.fixed + self.each * rows


def pays(step: Callable[[int], float], sharing: int, there: int) -> bool:
    """Whether one more image than those that share calls makes all that are there end sooner, on average.

    step: seconds of a step by images that share calls.

    >>> pays(lambda k: k / 8, 1, 9), pays(lambda k: 1 + k / 8, 1, 2)
    (False, True)
    """
    saved = step(sharing) / sharing - step(sharing + 1) / (sharing + 1)
    return there**2 * saved > step(sharing + 1) - step(sharing)


@dataclass
class _Size:
    """Steps of so many rows a lane: the seconds of the last, their median, when that was and the how manieth step."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    median: float = 0.0
    at_s: float = 0.0
    at: int = 0


class StepTimes:
    """Seconds of steps by rows a lane, and the line through them; what has not been seen for long is forgotten."""

    def __init__(self) -> None:
        self._sizes: dict[float, _Size] = {}
        self.count = 0

    def add(self, rows: float, seconds: float, now: float) -> None:
        """A step of so many rows a lane."""
        self.count += 1
        self._sizes = {each: size for each, size in self._sizes.items() if not self._forgotten(size, now)}
        size = self._sizes.setdefault(rows, _Size())
        size.seconds.append(seconds)
        size.median, size.at_s, size.at = statistics.median(size.seconds), now, self.count

    @property
    def least(self) -> float | None:
        """The least rows a lane of which there are enough steps."""
        return min((rows for rows, _ in self._known()), default=None)

    def cost(self) -> Cost | None:
        """Least squares through the medians of all sizes, by how many steps there are of each; None of one or none."""
        known = self._known()
        if len(known) < 2:
            return None
        weighed = [(len(size.seconds), rows, size.median) for rows, size in known]
        total = sum(w for w, _, _ in weighed)
        rows_mean = sum(w * x for w, x, _ in weighed) / total
        time_mean = sum(w * y for w, _, y in weighed) / total
        spread = sum(w * (x - rows_mean) ** 2 for w, x, _ in weighed)
        each = sum(w * (x - rows_mean) * (y - time_mean) for w, x, y in weighed) / spread
        return Cost(time_mean - each * rows_mean, each)

    def _forgotten(self, size: _Size, now: float) -> bool:
        return now - size.at_s > _REMEMBERED_S and self.count - size.at > _REMEMBERED_STEPS

    def _known(self) -> list[tuple[float, _Size]]:
        return [(rows, size) for rows, size in self._sizes.items() if len(size.seconds) >= _ENOUGH]


@dataclass(frozen=True)
class _Wanted:
    """What an image wants: so many rows since then, 0 of a task; beside it those of that mix."""

    rows: int
    since: float
    mix: int


class Sharing:
    """How many images are to share calls of the denoiser; told what every image wants, in the engine's thread.

    Steps are measured while nobody joins, leaves or runs a task. Until two sizes are known one image runs alone, then
    the fewest that are more rows a lane.
    """

    def __init__(self, lanes: int = 1, clock: Callable[[], float] = time.perf_counter) -> None:
        self._lanes, self._clock = lanes, clock
        self._times = StepTimes()
        self._least: float | None = None
        self._cost: Cost | None = None
        self._wanted: dict[Hashable, _Wanted] = {}
        self._mix = 0  # a number of its own for every set of images that have been beside each other
        self._rows_each = 1.0  # of an image, as they were last

    @property
    def cost(self) -> Cost | None:
        """Of a step; None before it is known."""
        return self._cost

    def limit(self, there: int, most: int) -> int:
        """How many images may share calls, of `there` that share or wait, and of `most` in any case."""
        if (cost := self._cost) is None:
            return min(most, self._unknown())
        found = 1
        while found < most and pays(lambda images: cost.of(self._a_lane(images)), found, there):
            found += 1
        return found

    def wants(self, image: Hashable, wanted: Call | Task | None) -> None:
        """An image has taken a step, and wants the next; None: that was the last."""
        now, last = self._clock(), self._wanted.pop(image, None)
        rows = wanted.rows if isinstance(wanted, Call) else 0
        if last is not None and last.rows and last.mix == self._mix:
            self._add(last, now)
        if last is None or wanted is None or last.rows != rows:
            self._mix += 1
        if wanted is not None:
            self._wanted[image] = _Wanted(rows, now, self._mix)

    def left(self, image: Hashable) -> None:
        """An image is done with, or was left in the middle of a step."""
        if self._wanted.pop(image, None) is not None:
            self._mix += 1

    def _add(self, last: _Wanted, now: float) -> None:
        """A step, unless a task took a lane from it meanwhile."""
        others = [wanted.rows for wanted in self._wanted.values()]
        if not all(others):
            return
        self._rows_each = (last.rows + sum(others)) / (1 + len(others))
        self._times.add(self._a_lane(1 + len(others)), now - last.since, now)
        if self._cost is None or self._times.count < _AT_ONCE or self._times.count % _EVERY == 0:
            self._least, self._cost = self._times.least, self._times.cost()

    def _a_lane(self, images: int) -> float:
        return max(1.0, images * self._rows_each / self._lanes)

    def _unknown(self) -> int:
        """How many are to be measured next."""
        least = self._least
        if least is None:
            return 1
        return next(images for images in itertools.count(1) if self._a_lane(images) > least)
