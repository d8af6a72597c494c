"""PSNR over the size of the files of every recipe of a comparison: python scripts/field_chart.py WORK OUT.png

WORK: the work folder of `hqc compare-recipes`. A panel is a width, a mark in it a recipe, the mean of its seeds.
"""

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib import pyplot, style

from hqc.evaluation.bench.chart import DPI, FAINT, INK, PAPER, STYLE

NAME = re.compile(r"(w\d+a\d+)-(.+)-(\d+)-figures")
Point = tuple[float, float]
"""MB, and PSNR in dB."""


def points(work: Path) -> dict[str, dict[str, Point]]:
    """bits -> recipe -> its point."""
    found: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for folder in sorted(work.glob("*-figures")):
        if match := NAME.fullmatch(folder.name):
            bits, name, seed = match.groups()
            figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
            plan = json.loads((work / f"{bits}-{name}-{seed}.hqc" / "plan.json").read_text(encoding="utf-8"))
            found[bits, name].append((plan["training"]["true_bytes"] / 1e6, figures["psnr_db"]))
    by_bits: dict[str, dict[str, Point]] = defaultdict(dict)
    for (bits, name), each in found.items():
        by_bits[bits][name] = (statistics.fmean(x for x, _ in each), statistics.fmean(y for _, y in each))
    return by_bits


def main(work: Path, out: Path) -> None:
    """Draws it."""
    found = points(work)
    widths = sorted(found, key=lambda bits: [-int(part) for part in bits[1:].split("a")])
    with style.context(["default", STYLE]):
        figure, panels = pyplot.subplots(
            1, len(widths), figsize=(4.4 * len(widths), 5.2), facecolor=PAPER, layout="constrained", squeeze=False
        )
        for axes, bits in zip(panels[0], widths, strict=True):
            for name, (x, y) in found[bits].items():
                axes.plot(x, y, "o", color="#c2570c" if name == "hqc" else "#2a6f97")
                axes.annotate(
                    name, (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=7, color=INK
                )
            axes.set_title(f"{bits}: PSNR to float, dB, over MB", loc="left", fontsize=9, color=INK)
            axes.set_xscale("log")
            axes.margins(x=0.2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("{x:g}")
            axes.set_xlabel("MB, codes at their bits", color=FAINT)
            axes.set_facecolor(PAPER)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(out, dpi=DPI)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
