"""The denoiser against both half-precision peers: every batch size prepared side by side, then timed in turns.

The contenders are the worker processes of `hqc bench`. All are loaded and compiled at once, which fills the cores and
is not timed; while one batch size is timed, all others are idle.
"""

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hqc.errors import HqcError
from hqc.evaluation.bench.contender import Contender, Loaded
from hqc.evaluation.bench.result import ratio, runs_data
from hqc.evaluation.bench.rounds import take_turns

HQC, PACKED, COMPILED, PLAIN = "hqc", "hqc int4 weights", "torch-fp16-compile", "torch-fp16-cudagraph"
RUNTIMES = {HQC: "torch-cuda", PACKED: "torch-cuda-int4", COMPILED: COMPILED, PLAIN: PLAIN}
"""Contender -> runtime of its worker; ours first."""
RUNS, WARM_UP, THREADS = 5, 1, 4

Key = tuple[int, str]
Put = Callable[..., None]


@dataclass(frozen=True)
class Contest:
    """Programs on disk, batch sizes in the order of their worth, and what compiles hqc's kernels beforehand."""

    quantised: Path
    float: Path
    batches: Sequence[int]
    warm: Sequence[str]
    environment: Mapping[str, str]

    def model(self, name: str) -> Path:
        """What a contender loads."""
        return self.quantised if name in (HQC, PACKED) else self.float


def run(contest: Contest, put: Put, work: Path, seconds: float) -> dict[str, str]:
    """Every figure into `put` at once; why contenders are missing, by "batch 8, hqc".

    seconds: for loading and compiling; who is not ready then is left out.
    """
    inputs = {batch: work / f"inputs-{batch}.npz" for batch in contest.batches}
    for batch, file in inputs.items():
        write_inputs(contest.quantised, batch, file)
    with _contenders(contest) as entrants:
        ready, failed = _prepare(contest, entrants, inputs, work, seconds)
        put(ready_seconds={_called(key): took for key, took in ready.items()})
        for batch in contest.batches:
            runners = {name: entrants[batch, name] for name in RUNTIMES if (batch, name) in ready}
            if not runners:
                continue
            rounds = take_turns(runners, runs=RUNS, warm_up=WARM_UP)
            failed |= {_called((batch, name)): why for name, why in rounds.failed.items()}
            put(batches={str(batch): _figures(runners, rounds.milliseconds, work)})
    return failed


def write_inputs(program: Path, batch: int, file: Path) -> None:
    """As `hqc bench`: seeded noise at the first timestep of the sampler."""
    from hqc.evaluation.bench.models import inputs_of
    from hqc.evaluation.bench.run import Timing, first_timestep, write_inputs

    write_inputs(inputs_of(program), Timing(batch), first_timestep(program), file)


@contextmanager
def _contenders(contest: Contest) -> Iterator[dict[Key, Contender]]:
    with ExitStack() as processes:
        yield {
            (batch, name): processes.enter_context(
                Contender(name, runtime, contest.model(name), environment=contest.environment)
            )
            for batch in contest.batches
            for name, runtime in RUNTIMES.items()
        }


def _prepare(
    contest: Contest, entrants: Mapping[Key, Contender], inputs: Mapping[int, Path], work: Path, seconds: float
) -> tuple[dict[Key, float], dict[str, str]]:
    """Seconds until each was ready, and why others were not.

    torch.compile begins at once, hqc when its kernels are compiled; the peer for which cuDNN times its own algorithms
    comes last and alone.
    """
    ready, failed, late = dict[Key, float](), dict[str, str](), dict[Key, str]()

    def note(key: Key, seconds_taken: Callable[[], float]) -> None:
        try:
            ready[key] = round(seconds_taken(), 1)
        except HqcError as error:
            failed[_called(key)] = late.get(key, error.found)

    with ThreadPoolExecutor(len(entrants) + 1) as pool:
        warm = pool.submit(_warm, contest, work, seconds)
        first = {
            key: pool.submit(_start, contender, inputs[key[0]], None if key[1] == COMPILED else warm)
            for key, contender in entrants.items()
            if key[1] != PLAIN
        }
        loads = {key: pool.submit(c.load, inputs[key[0]], THREADS) for key, c in entrants.items() if key[1] == PLAIN}
        wait([*first.values(), *loads.values()], seconds)
        for key, future in (*first.items(), *loads.items()):
            if not future.done():
                late[key] = f"not ready after {seconds:.0f} s"
                entrants[key].kill()  # which ends the wait of its thread
        for key, begun in first.items():
            note(key, begun.result)
        for key, load in loads.items():
            note(key, partial(_prepare_alone, entrants[key], load))
    return ready, failed


def _start(contender: Contender, inputs: Path, after: Future[None] | None) -> float:
    """Loads, waits, makes the first calls; its own seconds."""
    loaded = contender.load(inputs, THREADS).load_seconds
    if after is not None:
        after.result()
    return loaded + contender.prepare()


def _prepare_alone(contender: Contender, load: Future[Loaded]) -> float:
    return load.result().load_seconds + contender.prepare()


def _warm(contest: Contest, work: Path, seconds: float) -> None:
    """Nothing that it says counts: what is not compiled now is compiled by the first calls."""
    late = seconds + 2  # who waited for it is said to be late, before
    with (work / "warm.log").open("wb") as said, suppress(subprocess.TimeoutExpired):
        subprocess.run(contest.warm, stdout=said, stderr=subprocess.STDOUT, timeout=late, env=contest.environment)


def _called(key: Key) -> str:
    return f"batch {key[0]}, {key[1]}"


def _figures(
    runners: Mapping[str, Contender], milliseconds: Mapping[str, Sequence[float]], work: Path
) -> dict[str, Any]:
    """As `hqc bench --json`: medians with spread, ratios of the same rounds, memory, and how far outputs are apart.

    error_to_half: ‖y - r‖ / ‖r‖ of the output against the uncompiled half-precision peer's.
    """
    ours = milliseconds.get(HQC, ())
    ratios = {name: ratio(times, ours) for name, times in milliseconds.items() if name != HQC and ours}
    outputs = {}
    for name in milliseconds:
        runners[name].save_output(work / "output.npy")
        outputs[name] = np.load(work / "output.npy", allow_pickle=False).astype(np.float64)
    return {
        "milliseconds": {name: runs_data(times) for name, times in milliseconds.items()},
        "speedup": {name: found.median for name, found in ratios.items()},
        "speedup_spread": {name: [found.p10, found.p90] for name, found in ratios.items()},
        "device_bytes": {name: runners[name].memory().device_bytes for name in milliseconds},
        "error_to_half": _errors(outputs),
    }


def _errors(outputs: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]) -> dict[str, float]:
    """Nothing without the peer that they are judged by."""
    reference = outputs.get(PLAIN)
    if reference is None:
        return {}
    norm = max(float(np.linalg.norm(reference)), 1e-30)
    return {name: float(np.linalg.norm(y - reference)) / norm for name, y in outputs.items() if name != PLAIN}
