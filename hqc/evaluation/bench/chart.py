"""The figures as a picture by matplotlib: bars of milliseconds with spread and ratio, of bytes on disk and in memory.

The same figures give the same file, byte for byte: no date, no random ids, no settings of the user's own.
"""

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqc.atomic import write_file
from hqc.evaluation.bench.machine import machine_line
from hqc.evaluation.bench.result import BenchResult, Spread, spread
from hqc.wording import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["chart_bytes", "chart_figure", "save_chart"]

PAPER, INK, FAINT, OURS, PEER = "#fafaf8", "#1c1c1e", "#6e6e73", "#2a6f97", "#b8bec6"
WIDTH, MARGIN, ROW = 10.4, 0.26, 0.4  # inches
TITLE, TEXT, NOTE = 13, 9, 7.5  # points
LINE = 1.45  # of the size
BAR = 0.58  # of a row
DPI = 200
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": TEXT,
    "text.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # a model's name may hold dollars
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "hqc",
}


@dataclass(frozen=True)
class _Panel:
    """A column of bars on one scale, a value each for hqc and its peers; some have a spread."""

    title: str
    share: float  # of the width
    values: tuple[float, ...]
    texts: tuple[str, ...]
    spreads: tuple[Spread, ...] = ()


def save_chart(path: Path, result: BenchResult) -> None:
    """Writes the chart whole or not at all, in the format that the suffix names.

    Raises:
        ArtefactError: the file cannot be written.
    """
    write_file(path, chart_bytes(result, path.suffix.lower().removeprefix(".")))


def chart_bytes(result: BenchResult, kind: str) -> bytes:
    """The chart as a file: `kind` is png or svg."""
    from matplotlib import style

    buffer = io.BytesIO()
    metadata = {"Date": None, "Title": _title(result)} if kind == "svg" else {"Software": None}
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box
        chart_figure(result).savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def chart_figure(result: BenchResult) -> "Figure":
    """The chart, to be drawn in the style of `chart_bytes`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [f"hqc {result.quantisation}", *result.peers]
    left = MARGIN + max(_inches(name) for name in [*map(printable, names), *map(printable, result.failed)]) + 0.2
    failures = {name: _wrapped(f"failed: {reason}", NOTE, WIDTH - left - MARGIN) for name, reason in _failed(result)}
    title = _wrapped(_title(result), TITLE, WIDTH - 2 * MARGIN)
    protocol = _wrapped(_protocol(result), NOTE, WIDTH - 2 * MARGIN)
    machine = _wrapped(machine_line(dict(result.machine)), NOTE, WIDTH - 2 * MARGIN)
    above = MARGIN + _height(title, TITLE) + _height(protocol, NOTE) + 0.42
    failed = sum(max(ROW, _height(lines, NOTE) + 0.1) for lines in failures.values())
    below = MARGIN + _height(machine, NOTE) + 0.1 + failed
    height = above + ROW * len(names) + below
    figure = Figure(figsize=(WIDTH, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    _lines(figure, MARGIN, height - MARGIN, title, TITLE, INK)
    _lines(figure, MARGIN, height - MARGIN - _height(title, TITLE), protocol, NOTE, FAINT)
    _lines(figure, MARGIN, MARGIN + _height(machine, NOTE), machine, NOTE, FAINT)
    _draw_panels(figure, _panels(result), [printable(name) for name in names], left, above, below)
    y = below - 0.06
    for name, lines in failures.items():
        _lines(figure, MARGIN, y, [name], TEXT, INK)
        _lines(figure, left, y, lines, NOTE, FAINT)
        y -= max(ROW, _height(lines, NOTE) + 0.1)
    return figure


def _draw_panels(
    figure: "Figure", panels: Sequence[_Panel], names: Sequence[str], left: float, above: float, below: float
) -> None:
    width, height = figure.get_size_inches()
    grid = figure.add_gridspec(
        1,
        len(panels),
        width_ratios=[panel.share for panel in panels],
        wspace=0.08,
        left=left / width,
        right=1 - MARGIN / width,
        bottom=below / height,
        top=1 - above / height,
    )
    for column, panel in enumerate(panels):
        axes = figure.add_subplot(grid[0, column])
        _draw(axes, panel)
        axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
        if column == 0:
            axes.tick_params(axis="y", pad=(left - MARGIN) * 72)
            for label in axes.get_yticklabels():
                label.set_horizontalalignment("left")


def _draw(axes: "Axes", panel: _Panel) -> None:
    """Bars from the top down, the text right of the bar or of its whisker."""
    rows = range(len(panel.values))
    axes.barh(rows, panel.values, height=BAR, color=[OURS, *[PEER] * (len(rows) - 1)])
    ends = list(panel.values)
    for row, found in enumerate(panel.spreads):
        middle = [[found.median - found.p10], [found.p90 - found.median]]
        axes.errorbar(found.median, row, xerr=middle, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3, capthick=1.2)
        ends[row] = max(found.median, found.p90)
    longest = max(*ends, 1e-9)
    for row, text in enumerate(panel.texts):
        axes.annotate(text, (ends[row], row), xytext=(6, 0), textcoords="offset points", va="center")
    inches = axes.get_position().width * WIDTH
    room = max(_inches(text) for text in panel.texts) + 0.15
    axes.set_xlim(0, longest * inches / max(inches - room, 0.2 * inches))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(panel.title, loc="left", fontsize=TEXT, color=FAINT, pad=5)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)


def _panels(result: BenchResult) -> tuple[_Panel, ...]:
    spreads, texts = [], []
    for name, figures in result.contenders.items():
        found = spread(figures.milliseconds)
        ratio = f"  ({result.speedup(name).median:.2f}×)" if name in result.peers else ""
        spreads.append(found)
        texts.append(f"{_number(found.median)}{ratio}")
    disk = tuple(f.size_bytes / 1e6 for f in result.contenders.values())
    memory = tuple(f.memory_bytes / 1e6 for f in result.contenders.values())
    medians = tuple(found.median for found in spreads)
    return (
        _Panel("ms a call, p10 to p90 (× hqc's time)", 3.0, medians, tuple(texts), tuple(spreads)),
        _Panel("files, MB", 1.2, disk, tuple(map(_number, disk))),
        _Panel("memory, MB", 1.2, memory, tuple(map(_number, memory))),
    )


# ---- texts ---------------------------------------------------------------------------------------------------------


def _title(result: BenchResult) -> str:
    return printable(f"{result.model}, {result.quantisation}")


def _protocol(result: BenchResult) -> str:
    protocol = result.protocol
    return (
        f"batch {protocol['batch_size']}, {protocol['threads']} threads, median of {protocol['runs']} rounds, one run "
        f"of each in turn; memory: {result.memory_note}"
    )


def _failed(result: BenchResult) -> list[tuple[str, str]]:
    return [(printable(name), reason) for name, reason in result.failed.items()]


def _number(value: float) -> str:
    """Three digits, or all of the integer part."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _lines(figure: "Figure", x: float, y: float, lines: Sequence[str], size: float, colour: str) -> None:
    """Lines of text from a point downwards, in inches from the lower left."""
    width, height = figure.get_size_inches()
    for number, line in enumerate(lines):
        at = y - number * size * LINE / 72
        figure.text(x / width, at / height, line, fontsize=size, color=colour, va="top")


def _height(lines: Sequence[str], size: float) -> float:
    return len(lines) * size * LINE / 72


def _wrapped(text: str, size: float, width: float) -> list[str]:
    """Lines that fit into some inches; of mean letters, so with room to spare."""
    letters = max(10, int(width * 72 / (0.57 * size)))
    return textwrap.wrap(printable(text), letters, break_long_words=True)


def _inches(text: str) -> float:
    """How wide a text of the usual size is."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans")
    return float(TextPath((0, 0), f"{text}|", size=TEXT, prop=font).get_extents().width) / 72
