"""The table and the plot of the whole field from committed figures; adds those of further runs to them.

    python scripts/field_table.py                      writes the table, the plot, and the short table of recipes.md
    python scripts/field_table.py --add more.json …    first adds what `hqc compare-recipes --json` printed

Figures are those of docs/measurements/digits-field.json. Cells of several machines and nights are put together so;
figures by timestep are left out of what is kept.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from matplotlib import pyplot, style, ticker

from hqc.evaluation.bench.chart import DPI, FAINT, INK, PAPER, STYLE
from hqc.evaluation.comparison.rows import Comparison, Mean, Row, merged
from hqc.evaluation.comparison.table import markdown

DOCS = Path(__file__).resolve().parents[1] / "docs"
FIGURES = DOCS / "measurements" / "digits-field.json"
PLOT = DOCS / "images" / "field.png"
RECIPES = DOCS / "recipes.md"
HEAD = "PSNR, dB / FID to float"
SHORT = re.compile(rf"^\| {HEAD} \|.*(\n\|.*)+", re.MULTILINE)
APART = 0.5, 0.025
"""How far names are apart: in the logarithm of MB, in shares of the panel's height."""
WIDTHS = ("w8a8", "w4a8", "w4a4", "w4a3")
UNPLOTTED = "passionsr"  # far below the others: no method for this sampler


def read(path: Path) -> Comparison:
    """The comparison in a file."""
    return Comparison.from_dict(json.loads(path.read_text(encoding="utf-8")))


def without_timesteps(comparison: Comparison) -> Comparison:
    """With the figures that a table shows."""
    return replace(comparison, rows=tuple(replace(row, figures=_kept(row.figures)) for row in comparison.rows))


def _kept(figures: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    return {seed: {k: v for k, v in one.items() if k != "trajectory"} for seed, one in sorted(figures.items())}


# ---- a short table ---------------------------------------------------------------------------------------------------


def short(comparison: Comparison) -> str:
    """PSNR and FID of every recipe at every width, by PSNR at w4a4."""
    rows = {(row.bits, row.name): row for row in comparison.rows if row.figures}
    names = sorted({name for _, name in rows}, key=lambda name: -_psnr(rows.get(("w4a4", name))))
    lines = [[HEAD, "file MB at w4a4", "by bits", *WIDTHS], ["---"] * (3 + len(WIDTHS))]
    for name in names:
        sizes = [_size(rows.get(("w4a4", name)), key) for key in ("file_bytes", "size_bytes")]
        cells = [_pair(rows.get((bits, name))) for bits in WIDTHS]
        lines.append([_named(name, rows.values()), *sizes, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _size(row: Row | None, key: str) -> str:
    size = None if row is None else row.mean(key)
    return "–" if size is None else f"{size.value / 1e6:.2f}"


def _named(name: str, rows: Iterable[Row]) -> str:
    alone = any(one.get("weight_only") for row in rows if row.name == name for one in row.figures.values())
    return f"`{name}` (activations float)" if alone else f"`{name}`"


def _psnr(row: Row | None) -> float:
    mean = None if row is None else row.mean("psnr_db")
    return -math.inf if mean is None else mean.value


def _pair(row: Row | None) -> str:
    means = [] if row is None else [row.mean(key) for key in ("psnr_db", "fid_reference")]
    return " / ".join(_shown(mean, digits) for mean, digits in zip(means, (1, 2), strict=False) if mean) or "–"


def _shown(mean: Mean, digits: int) -> str:
    spread = f" ± {mean.deviation:.{digits}f}" if mean.count > 1 else ""
    return f"{mean.value:.{digits}f}{spread}"


# ---- the plot --------------------------------------------------------------------------------------------------------


def plot(comparison: Comparison, out: Path) -> None:
    """PSNR over the MB of files: a panel is a width, a mark in it a recipe, the mean of its seeds with their deviation.

    A mark is hollow, and over MB by bits, where there is no integer file.
    """
    shown = [row for row in comparison.rows if row.name != UNPLOTTED and row.figures]
    widths = [bits for bits in WIDTHS if any(row.bits == bits for row in shown)]
    with style.context(["default", STYLE]):
        figure, panels = pyplot.subplots(
            1, len(widths), figsize=(4.4 * len(widths), 5.2), facecolor=PAPER, layout="constrained", squeeze=False
        )
        for axes, bits in zip(panels[0], widths, strict=True):
            axes.set_title(f"{bits}: PSNR to float, dB, over file MB", loc="left", fontsize=9, color=INK)
            axes.set_xscale("log")
            axes.set_xlim(2, 14)
            axes.xaxis.set_major_locator(ticker.FixedLocator([2, 3, 4, 5, 6, 8, 10]))
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("MB of the exported file; hollow: by bits, no integer file", color=FAINT)
            axes.set_facecolor(PAPER)
            axes.spines[["top", "right"]].set_visible(False)
            _marks(axes, [row for row in shown if row.bits == bits])
        figure.savefig(out, dpi=DPI)


def _marks(axes: Any, rows: Sequence[Row]) -> None:
    """Marks with their names, which are moved up where one would stand on another."""
    points = sorted((_point(row) for row in rows), key=lambda point: point[1])
    for x, y, deviation, name, filled in points:
        colour = "#c2570c" if name == "hqc" else "#2a6f97"
        axes.errorbar(x, y, yerr=deviation or None, fmt="o", color=colour, mfc=colour if filled else PAPER)
    low, high = axes.get_ylim()
    taken: list[tuple[float, float]] = []  # log of MB, PSNR
    for x, y, _, name, _ in points:
        at = y
        for other_x, other_y in taken:
            if abs(other_x - math.log(x)) < APART[0] and at - other_y < APART[1] * (high - low):
                at = other_y + APART[1] * (high - low)
        taken.append((math.log(x), at))
        axes.annotate(name, (x, at), xytext=(6, 0), textcoords="offset points", va="center", fontsize=7, color=INK)


def _point(row: Row) -> tuple[float, float, float, str, bool]:
    """MB, PSNR, its deviation, the row's name, and whether the MB are a file's."""
    size, psnr = row.megabytes, row.mean("psnr_db")
    assert size is not None
    assert psnr is not None
    alone = any(figures.get("weight_only") for figures in row.figures.values())
    return size, psnr.value, psnr.deviation, f"{row.name} (a16)" if alone else row.name, row.has_file


def main() -> None:
    """Adds, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="what `hqc compare-recipes --json` printed")
    options = parser.parse_args()
    comparison = without_timesteps(reduce(merged, map(read, options.add), read(FIGURES)))
    FIGURES.write_text(json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    FIGURES.with_suffix(".md").write_text(markdown(comparison), encoding="utf-8")
    plot(comparison, PLOT)
    text = RECIPES.read_text(encoding="utf-8")
    RECIPES.write_text(SHORT.sub(lambda _: short(comparison), text, count=1), encoding="utf-8")


if __name__ == "__main__":
    main()
