"""What the table is made of: the figures of a recipe at some bits over the seeds, and its rank."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hqc.errors import ArtefactError

__all__ = ["Comparison", "Mean", "Row", "mean_of", "merged", "ranked"]

FID, PSNR = "fid_reference", "psnr_db"


@dataclass(frozen=True)
class Mean:
    """Mean and sample standard deviation over the seeds; 0 of a single one."""

    value: float
    deviation: float
    count: int


def mean_of(values: Iterable[float]) -> Mean | None:
    """Of as many as there are.

    >>> mean_of([1.0, 3.0]).value, mean_of([]), mean_of([2.0]).deviation
    (2.0, None, 0.0)
    """
    found = list(values)
    if not found:
        return None
    return Mean(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


@dataclass(frozen=True)
class Row:
    """A recipe at some bits: the figures by seed, the errors by seed, and its rank among those of the same bits."""

    name: str
    kind: str
    bits: str
    figures: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
    rank: int | None = None

    def mean(self, key: str) -> Mean | None:
        """Of one figure; identical images, whose PSNR is none, count as infinite."""
        values = [figures.get(key) for figures in self.figures.values()]
        if key == PSNR:
            values = [math.inf if value is None else value for value in values]
        known = [value for value in values if value is not None]
        if known and not all(map(math.isfinite, known)):
            return Mean(math.inf, 0.0, len(known))
        return mean_of(known)

    @property
    def megabytes(self) -> float | None:
        """Of the exported file; by bits where there is none."""
        size = self.mean("file_bytes") or self.mean("size_bytes")
        return None if size is None else size.value / 1e6

    @property
    def has_file(self) -> bool:
        """Whether the size of an export is known."""
        return self.mean("file_bytes") is not None

    def by_timestep(self, key: str) -> list[tuple[float, float]]:
        """(timestep, mean over the seeds) of a figure of the trajectory, in the order of sampling."""
        found: dict[float, list[float]] = {}
        for figures in self.figures.values():
            for timestep, value in zip(figures["trajectory"]["timesteps"], figures["trajectory"][key], strict=True):
                if value is not None:
                    found.setdefault(timestep, []).append(value)
        return [(timestep, statistics.fmean(values)) for timestep, values in found.items()]

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "recipe": self.name,
            "kind": self.kind,
            "bits": self.bits,
            "rank": self.rank,
            "cells": {str(seed): dict(figures) for seed, figures in self.figures.items()},
            "errors": {str(seed): error for seed, error in self.errors.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Row":
        """What `to_dict` gave."""
        figures, errors = ({int(seed): one for seed, one in data[key].items()} for key in ("cells", "errors"))
        return cls(data["recipe"], data["kind"], data["bits"], figures, errors, data["rank"])


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they were made with.

    seeds: how many were asked for. ranked_by: the figure's key. notes: lines under the table.
    """

    program: str
    rows: tuple[Row, ...]
    seeds: int
    ranked_by: str
    float_bytes: int
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether a cell failed."""
        return any(row.errors for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        rows = [row.to_dict() for row in self.rows]
        made = {"float_bytes": self.float_bytes, "notes": list(self.notes), **self.data}
        return {"program": self.program, "seeds": self.seeds, "ranked_by": self.ranked_by, **made, "rows": rows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Comparison":
        """What `to_dict` gave."""
        own = ("program", "seeds", "ranked_by", "float_bytes", "notes", "rows")
        rows = tuple(map(Row.from_dict, data["rows"]))
        more = {key: value for key, value in data.items() if key not in own}
        seeds, by, float_bytes = (data[key] for key in own[1:4])
        return cls(data["program"], rows, seeds, by, float_bytes, tuple(data["notes"]), more)


def merged(first: Comparison, other: Comparison) -> Comparison:
    """Cells of two runs of one protocol, as of two machines, in one; of a cell in both, the other's.

    Raises:
        ArtefactError: if program, protocol or budgets differ.
    """
    for name, one, two in [
        ("program", first.program, other.program),
        *((key, first.data.get(key), other.data.get(key)) for key in ("protocol", "budgets")),
    ]:
        if one != two:
            raise ArtefactError("the comparisons", f"differ in {name}: {one} and {two}", "Merge those of one kind.")
    rows = {(row.bits, row.name): row for row in first.rows}
    for row in other.rows:
        known = rows.get((row.bits, row.name), row)
        errors = {seed: error for seed, error in known.errors.items() if seed not in row.figures}
        found = {**known.figures, **row.figures}
        rows[row.bits, row.name] = replace(row, figures=found, errors={**errors, **row.errors})
    seeds = max(first.seeds, other.seeds)
    return replace(first, rows=ranked(list(rows.values()), first.ranked_by), seeds=seeds)


def ranked(rows: Sequence[Row], key: str) -> tuple[Row, ...]:
    """The rows by bits as they come, within the same bits by that figure: the best first, those without it last.

    A row shares the rank of the best of that rank while it is within one standard deviation of it, the larger one of
    both rows. The rank after shared ones counts them: 1, 1, 3.
    """
    found: list[Row] = []
    for bits in dict.fromkeys(row.bits for row in rows):
        found += _ranked([row for row in rows if row.bits == bits], -1.0 if key == PSNR else 1.0, key)
    return tuple(found)


def _ranked(rows: Sequence[Row], sign: float, key: str) -> list[Row]:
    means = [(mean, row) for row in rows if (mean := row.mean(key)) is not None]
    means.sort(key=lambda pair: sign * pair[0].value)
    found: list[Row] = []
    best, rank = None, 0
    for place, (mean, row) in enumerate(means, 1):
        if best is None or not _ties(best, mean):
            best, rank = mean, place
        found.append(replace(row, rank=rank))
    return found + [row for row in rows if row.mean(key) is None]


def _ties(best: Mean, other: Mean) -> bool:
    if best.value == other.value:
        return True
    return abs(best.value - other.value) <= max(best.deviation, other.deviation)
