"""Taking turns: one run of each contender a round, so that what slows the machine for a while slows them all."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hqc.errors import HqcError
from hqc.evaluation.bench.contender import Runner

__all__ = ["PAUSE_SECONDS", "Rounds", "take_turns"]

PAUSE_SECONDS = 0.05
"""Before each turn: the threads of a pool go on spinning for a while after their run, on the next one's cores."""


@dataclass(frozen=True)
class Rounds:
    """Milliseconds of every contender's timed runs, in rounds; and why the others were dropped."""

    milliseconds: Mapping[str, tuple[float, ...]]
    failed: Mapping[str, str]


def take_turns(
    runners: Mapping[str, Runner],
    *,
    runs: int,
    warm_up: int,
    pause: Callable[[], None] = lambda: time.sleep(PAUSE_SECONDS),
    on_round: Callable[[int], None] = lambda done: None,
) -> Rounds:
    """Runs every contender once a round, the first of a round being the next one each time.

    warm_up: rounds whose times are dropped. A contender that fails is dropped; the others go on.
    """
    names = list(runners)
    times: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for done in range(warm_up + runs):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            if name in failed:
                continue
            pause()
            try:
                milliseconds = runners[name].run()
            except HqcError as error:
                failed[name] = error.found
                continue
            if done >= warm_up:
                times[name].append(milliseconds)
        on_round(done + 1)
    return Rounds({name: tuple(values) for name, values in times.items() if name not in failed}, failed)
