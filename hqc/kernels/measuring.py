"""Tiles measured: every candidate of every product, the quickest kept in a table as the work goes on.

`tune` knows nothing of CUDA: a `Timer` times a product's tiles, `timing` has the one for a GPU.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import torch

from hqc.errors import ArtefactError
from hqc.kernels.calls import Work
from hqc.kernels.candidates import tuning_candidates
from hqc.kernels.cards import Card
from hqc.kernels.products import Product, ProductTile
from hqc.kernels.tile_model import model_nanoseconds
from hqc.kernels.tiles import product_tile
from hqc.kernels.tuned import Table, Timed, kernels_version, read_table, triton_version, write_table
from hqc.kernels.tuning import stale

__all__ = ["Measured", "Timer", "TuningReport", "begun_table", "tune"]


class Timer(Protocol):
    """What times tiles."""

    def prepare(self, work: Work, tiles: Sequence[ProductTile]) -> None:
        """Told of everything that is going to be timed, in this order, before the first."""

    def time(self, work: Work, tiles: Sequence[ProductTile]) -> Sequence[float | str]:
        """Microseconds of a call in each tile, or why it has none: it does not compile, or gives other bits."""


@dataclass(frozen=True)
class Measured:
    """A product after its measurement: the tile that it took before, and the quickest. count: calls in the module."""

    product: Product
    count: int
    before: Timed
    best: Timed


@dataclass
class TuningReport:
    """What a tuning did. kept: products that were in the file already; left: those that the time did not reach."""

    path: Path
    measured: list[Measured] = field(default_factory=list)
    kept: int = 0
    left: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def us_before(self) -> float:
        """Microseconds of all calls that were measured, in the tiles that they took before."""
        return sum(m.count * m.before.us for m in self.measured)

    @property
    def us_after(self) -> float:
        """The same in the quickest tiles."""
        return sum(m.count * m.best.us for m in self.measured)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "file": str(self.path),
            "measured": len(self.measured),
            "kept": self.kept,
            "left": self.left,
            "us_before": round(self.us_before, 2),
            "us_after": round(self.us_after, 2),
            "problems": self.problems,
            "products": [
                {
                    **vars(m.product),
                    "count": m.count,
                    "before": {"us": m.before.us, **vars(m.before.tile)},
                    "best": {"us": m.best.us, **vars(m.best.tile)},
                }
                for m in self.measured
            ],
        }


def begun_table(path: Path, card: Card) -> tuple[Table, str]:
    """The table to go on with, and why what lies there is not it (empty if it is, or if nothing does)."""
    made = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "kernels": kernels_version(),
    }
    empty = Table(card, {}, made)
    if not path.exists():
        return empty, ""
    try:
        found = read_table(path)
    except ArtefactError as error:
        return empty, f"{path} {error.found}"
    reason = stale(found, card)
    return (empty, f"{path} {reason}") if reason else (found, "")


def tune(
    works: Sequence[Work],
    timer: Timer,
    card: Card,
    path: Path,
    *,
    limit_seconds: float | None = None,
    on_product: Callable[[int, str], None] = lambda done, note: None,
    clock: Callable[[], float] = time.monotonic,
) -> TuningReport:
    """Measures the products that the file at `path` does not have, those that take the most time first.

    The file is written after each. limit_seconds: no product is begun after so long; what is left is counted.

    Raises:
        ArtefactError: if the file cannot be written.
    """
    table, reason = begun_table(path, card)
    report = TuningReport(path, problems=[f"{reason}: begun anew"] if reason else [])
    write_table(path, table)  # what cannot be written is found out before the work
    ordered = sorted(works, key=lambda work: _share(work, card), reverse=True)
    rest = [work for work in ordered if work.product not in table.products]
    report.kept = len(works) - len(rest)
    tiles = {work.product: _tiles(work, card) for work in rest}
    started = clock()
    for work in rest:
        timer.prepare(work, tiles[work.product])
    for index, work in enumerate(rest):
        if limit_seconds is not None and clock() - started >= limit_seconds:
            report.left = len(rest) - index
            break
        found = _measured(work, tiles[work.product], timer, report)
        if found:
            table = replace(table, products={**table.products, work.product: found})
            write_table(path, table)
            before = next((t for t in found if t.tile == tiles[work.product][0]), found[0])
            report.measured.append(Measured(work.product, work.count, before, found[0]))
        on_product(report.kept + index + 1, f"{work.product.rows}×{work.product.channels}→{work.product.outputs}")
    return report


def _tiles(work: Work, card: Card) -> list[ProductTile]:
    """The tile that the product takes without a tuning, then the candidates."""
    product = work.product
    form = {"taps": product.taps, "rotation": product.rotation, "two_digits": product.two_digits}
    shape = (product.rows, product.outputs, product.channels)
    usual = [product_tile(*shape, **form, card=card, whole_rows=rows, unsplit=one) for rows, one in work.limits]  # type: ignore[arg-type]
    return list(dict.fromkeys([*usual, *tuning_candidates(product, card, work.limits)]))


def _share(work: Work, card: Card) -> float:
    """Nanoseconds of the module's time that a product takes, as the model thinks."""
    return work.count * model_nanoseconds(work.product, _tiles(work, card)[0], card)


def _measured(work: Work, tiles: Sequence[ProductTile], timer: Timer, report: TuningReport) -> tuple[Timed, ...]:
    """The tiles that gave the right bits with their times, the quickest first."""
    found = []
    for tile, answer in zip(tiles, timer.time(work, tiles), strict=True):
        if isinstance(answer, str):
            report.problems.append(f"{_name(work.product)} in {_sizes(tile)}: {answer}")
        else:
            found.append(Timed(round(answer, 3), tile))
    return tuple(sorted(found, key=lambda timed: timed.us))


def _name(product: Product) -> str:
    taps = f"·{product.taps}" if product.taps > 1 else ""
    return f"{product.rows}×{product.channels}{taps}→{product.outputs}"


def _sizes(tile: ProductTile) -> str:
    parts = f" in {tile.splits} parts" if tile.splits > 1 else ""
    return f"{tile.rows}×{tile.outputs}×{tile.channels}{parts}, {tile.num_warps} warps, {tile.num_stages} stages"
