"""Two plots of a comparison by matplotlib: PSNR over size, and what happens along the sampler.

The same figures give the same file, byte for byte, as with the benchmark's chart, whose look this is.
"""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hqc.evaluation.bench.chart import DPI, FAINT, INK, PAPER, STYLE
from hqc.evaluation.comparison.rows import PSNR, Comparison, Row
from hqc.wording import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plots_bytes"]

WIDTH, HEIGHT = 13.2, 4.4  # inches
COLOURS = ("#2a6f97", "#c2570c", "#3a8a4d", "#8a6fc0", "#b0303c", "#7a7d1f", "#1c1c1e", "#8a949d")
DASHES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D", "v", "P")


def plots_bytes(comparison: Comparison, kind: str) -> bytes:
    """Both as one picture: `kind` is png or svg."""
    from matplotlib import style

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box
        _figure(comparison).savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def _figure(comparison: Comparison) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    sizes, gains, errors = figure.subplots(1, 3)
    rows = [row for row in comparison.rows if row.figures]
    widths = list(dict.fromkeys(row.bits for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    looks = {
        (row.bits, row.name): (
            COLOURS[names.index(row.name) % len(COLOURS)],
            DASHES[widths.index(row.bits) % len(DASHES)],
            MARKS[widths.index(row.bits) % len(MARKS)],
        )
        for row in rows
    }
    _draw_sizes(sizes, rows, looks)
    _draw_steps(gains, rows, looks, "gain_by_timestep", "ε gain on the float model's trajectory")
    gains.axhline(1.0, color=FAINT, linewidth=0.8)
    _draw_steps(errors, rows, looks, "latent_cosine_by_timestep", "1 − cosine of the latents with float's")
    handles, labels = sizes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, max(1, len(labels))), frameon=False)
    return figure


_Looks = dict[tuple[str, str], tuple[str, str, str]]


def _draw_sizes(axes: "Axes", rows: Sequence[Row], looks: _Looks) -> None:
    """One mark a row, with a whisker of one standard deviation; a hollow one where there is no file."""
    for row in rows:
        size, psnr = row.megabytes, row.mean(PSNR)
        colour, _, mark = looks[row.bits, row.name]
        if size is not None and psnr is not None and psnr.value < float("inf"):
            label = printable(f"{row.name} {row.bits}")
            fill = colour if row.has_file else PAPER
            axes.errorbar(
                *(size, psnr.value), yerr=psnr.deviation, fmt=mark, color=colour, mfc=fill, label=label, capsize=3
            )
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=4)
    _frame(axes, "PSNR to float, dB, over MB", "MB of the exported file; hollow: by bits, no file")


def _draw_steps(axes: "Axes", rows: Sequence[Row], looks: _Looks, key: str, title: str) -> None:
    """One line a row, in the order of sampling."""
    from matplotlib.ticker import LogLocator, NullLocator

    cosine = key.startswith("latent_cosine")
    for row in rows:
        points = row.by_timestep(key)
        colour, dash, _ = looks[row.bits, row.name]
        values = [max(1 - value, 1e-9) if cosine else value for _, value in points]
        axes.plot([timestep for timestep, _ in points], values, dash, color=colour, linewidth=1.4)
    if cosine and any(row.by_timestep(key) for row in rows):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")  # the usual one writes formulas
    axes.invert_xaxis()
    _frame(axes, title, "timestep")


def _frame(axes: "Axes", title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel(below, color=FAINT)
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=FAINT)
