"""Error over size as a picture: the front that was predicted, what was trained, and what was chosen."""

import io
from typing import Literal

from hqc.evaluation.bench.chart import DPI, FAINT, INK, STYLE
from hqc.search.joint.run import Adapted

__all__ = ["plot_bytes"]

_BLUE, _ORANGE = "#2a6f97", "#c2570c"


def plot_bytes(found: Adapted, kind: Literal["png", "svg"]) -> bytes:
    """The picture; the same figures give the same file."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer, metadata = io.BytesIO(), {"Date": None} if kind == "svg" else {"Software": None}
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        mega = [(cost / 1e6, 100 * error) for cost, error in found.front]
        axes.plot(*zip(*mega, strict=True), color=FAINT, marker=".", label="predicted front")
        axes.scatter(
            [one.cost / 1e6 for one in found.trained],
            [100 * one.measured for one in found.trained],
            color=_BLUE,
            label="trained, measured",
            zorder=3,
        )
        chosen = (found.best.cost / 1e6, 100 * found.best.measured)
        axes.scatter(*chosen, color=_ORANGE, marker="D", label="chosen", zorder=4)
        axes.axvline(found.budget / 1e6, color=INK, linestyle=":", linewidth=1)
        axes.set_xlabel("MB, LoRAs at 16 bits included; dotted: the budget")
        axes.set_ylabel("error of the output, %")
        axes.legend(frameon=False)
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()
