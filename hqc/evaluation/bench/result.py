"""The figures of a benchmark, and what is computed from them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hqc.evaluation.bench.contender import Loaded
from hqc.evaluation.workspace import Stage

__all__ = ["DEFINITIONS", "BenchResult", "Figures", "Spread", "ratio", "runs_data", "spread"]

DEFINITIONS: Mapping[str, str] = {
    "speedup": "median over the rounds of (peer ms / hqc ms) in the same round; above 1 hqc is faster",
    "speedup_spread": "10th and 90th percentile of the same ratios",
    "milliseconds": "wall time of one denoiser call, equal inputs for all: median, 10th and 90th percentile, every run",
    "size_bytes": "files that the runtime reads: graph and weights",
    "load_seconds": "opening the model from disk, the runtime imported before, the file cache as it is; with "
    "the first calls where these compile or capture, what a compiler keeps of earlier runs included",
    "resident_bytes": "resident set of the contender's own process after the timed runs, runtime included",
    "runtime_resident_bytes": "the same after the runtime's import, before the model",
    "loaded_resident_bytes": "the same after loading, before the first run",
    "device_bytes": "on a GPU: the most that torch had allocated on it from the first call on, weights included",
    "peak_resident_bytes": "the largest resident set of the process until after the timed runs",
    "error_to_float": "norm(output - reference) / norm(reference), the float program in torch, on normal noise at the "
    "first sampler timestep",
}


@dataclass(frozen=True)
class Spread:
    """Median with the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """Of one or more values; percentiles interpolate linearly.

    >>> spread([1.0, 2.0, 3.0])
    Spread(median=2.0, p10=1.2, p90=2.8)
    """
    low, high = (round(float(p), 12) for p in np.percentile(values, (10, 90)))
    return Spread(statistics.median(values), low, high)


@dataclass(frozen=True)
class Figures:
    """What was measured of one contender; `milliseconds` one a round."""

    what: str
    runtime: str
    milliseconds: tuple[float, ...]
    size_bytes: int
    loaded: Loaded
    resident_bytes: int
    peak_resident_bytes: int
    error_to_float: float
    notes: tuple[str, ...] = ()
    device_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """Of the GPU if it runs on one, else the process's resident set."""
        return self.device_bytes or self.resident_bytes


@dataclass(frozen=True)
class BenchResult:
    """The compared model `ours`, its peers from the fastest on, those that failed with the reason, and how."""

    model: str
    quantisation: str  # bits and method
    protocol: Mapping[str, Any]  # batch size, threads, runs, …
    machine: Mapping[str, Any]
    stages: tuple[Stage, ...]
    ours: Figures
    peers: Mapping[str, Figures]
    failed: Mapping[str, str]

    @property
    def contenders(self) -> dict[str, Figures]:
        """All that was measured, ours first."""
        return {"hqc": self.ours, **self.peers}

    @property
    def on_gpu(self) -> bool:
        """Whether the compared model runs on a GPU."""
        return self.ours.device_bytes > 0

    @property
    def memory_note(self) -> str:
        """What the memory figures count."""
        if self.on_gpu:
            return "the most that torch allocated on the GPU, weights included"
        return "the resident set of each contender's own process after its runs, the runtime included"

    def speedup(self, peer: str) -> Spread:
        """How many times as long as ours a peer's call takes, round by round."""
        return ratio(self.peers[peer].milliseconds, self.ours.milliseconds)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data: one mapping a figure, from contender to value; see `definitions` in it."""
        everyone = self.contenders
        ratios = {name: self.speedup(name) for name in self.peers}
        return {
            "model": self.model,
            "quantisation": self.quantisation,
            "speedup": {name: ratio.median for name, ratio in ratios.items()},
            "speedup_spread": {name: [ratio.p10, ratio.p90] for name, ratio in ratios.items()},
            "milliseconds": {name: runs_data(figures.milliseconds) for name, figures in everyone.items()},
            "size_bytes": {name: figures.size_bytes for name, figures in everyone.items()},
            "resident_bytes": {name: figures.resident_bytes for name, figures in everyone.items()},
            "peak_resident_bytes": {name: figures.peak_resident_bytes for name, figures in everyone.items()},
            "loaded_resident_bytes": {name: f.loaded.loaded_resident_bytes for name, f in everyone.items()},
            "runtime_resident_bytes": {name: f.loaded.runtime_resident_bytes for name, f in everyone.items()},
            "device_bytes": {name: figures.device_bytes for name, figures in everyone.items()},
            "load_seconds": {name: figures.loaded.load_seconds for name, figures in everyone.items()},
            "error_to_float": {name: figures.error_to_float for name, figures in everyone.items()},
            "what": {name: figures.what for name, figures in everyone.items()},
            "notes": {name: list(figures.notes) for name, figures in everyone.items() if figures.notes},
            "failed": dict(self.failed),
            "protocol": dict(self.protocol),
            "machine": dict(self.machine),
            "stages": [stage.to_dict() for stage in self.stages],
            "definitions": dict(DEFINITIONS),
        }


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times as long as ours theirs take, of the runs of the same rounds.

    >>> ratio([2.0, 6.0, 12.0], [1.0, 2.0, 3.0]).median
    3.0
    """
    return spread([one / other for one, other in zip(theirs, ours, strict=True)])


def runs_data(values: Sequence[float]) -> dict[str, Any]:
    """Their spread and all of them, as JSON data."""
    found = spread(values)
    return {"median": found.median, "p10": found.p10, "p90": found.p90, "runs": list(values)}
