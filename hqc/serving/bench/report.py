"""The figures as a Markdown table and as a picture."""

import io
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hqc.atomic import write_file
from hqc.evaluation.bench.machine import describe_machine, machine_line
from hqc.serving.bench.run import Latency, ServeBench
from hqc.wording import printable

__all__ = ["save_serve_chart", "serve_table"]

NAMES = {"adaptive": "adaptive", "continuous": "continuous", "static": "static", "single": "one at a time"}
COLOURS = {"adaptive": "#2a6f97", "continuous": "#7a5195", "static": "#d08c2f", "single": "#8a8f98"}


def serve_table(result: ServeBench) -> Group:
    """A row a policy: images a second when saturated, latencies at every share of the load; the protocol below."""
    table = Table(box=MARKDOWN, pad_edge=True)
    columns = ["batching", "images/s, saturated", "× one at a time"]
    for share in result.protocol.shares:
        columns.append(f"at {share:g}: p50 / p95 / first preview, s")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for policy, found in result.policies.items():
        loads = (_latencies(found.latencies[share]) for share in result.protocol.shares)
        row = (NAMES[policy], f"{found.images_per_s:.2f}", f"{result.ratio(policy):.2f}", *loads)
        table.add_row(*map(Text, row))
    return Group(table, *(Text(line) for line in ("", *_lines(result))))


def _latencies(latency: Latency) -> str:
    first = "–" if latency.first_p50_s is None else f"{latency.first_p50_s:.2f}"
    return f"{latency.p50_s:.2f} / {latency.p95_s:.2f} / {first}"


def _lines(result: ServeBench) -> list[str]:
    protocol = result.protocol
    rates = ", ".join(f"{rate:.2f}" for rate in result.rates.values())
    low, high = protocol.steps
    threads = (
        "the runtime's own choice of threads"
        if result.threads is None
        else f"{result.threads} thread" + "s" * (result.threads > 1)
    )
    if result.lanes > 1:
        threads = f"{result.lanes} lanes of {threads}"
    return [
        f"{printable(result.model)}, {result.runtime}, {threads}; batch of {protocol.max_batch} images; guidance "
        f"{protocol.guidance_scale:g}, {low} to {high} steps; {protocol.requests} requests a figure, over HTTP.",
        f"Saturated: {2 * protocol.max_batch} requests always under way. Loads are shares of what one at a time draws "
        f"then, as Poisson arrivals: {rates} requests/s, the same moments for every policy.",
        machine_line(describe_machine()),
    ]


def save_serve_chart(path: Path, result: ServeBench) -> None:
    """Bars of images a second, and latency over the load with its 95th percentile; whole or not at all.

    Raises:
        ArtefactError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), facecolor="#fafaf8", layout="constrained")
    FigureCanvasAgg(figure)
    bars, lines = figure.subplots(1, 2, width_ratios=(1, 1.7))
    _draw_bars(bars, result)
    _draw_latencies(lines, result)
    figure.suptitle(printable(f"{result.model}, {result.runtime}"), x=0.01, ha="left", fontsize=12)
    buffer = io.BytesIO()
    kind = path.suffix.lower().removeprefix(".")
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    write_file(path, buffer.getvalue())


def _draw_bars(axes: Any, result: ServeBench) -> None:
    names = list(result.policies)
    speeds = [result.policies[name].images_per_s for name in names]
    axes.barh(range(len(names)), speeds, color=[COLOURS[name] for name in names], height=0.6)
    for row, (name, speed) in enumerate(zip(names, speeds, strict=True)):
        axes.annotate(
            f"{speed:.2f}  ({result.ratio(name):.2f}×)",
            (0, row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes.invert_yaxis()
    axes.set_title("images/s, saturated", loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_latencies(axes: Any, result: ServeBench) -> None:
    for name, found in result.policies.items():
        rates = [result.rates[share] for share in result.protocol.shares]
        latencies = [found.latencies[share] for share in result.protocol.shares]
        axes.plot(
            rates, [each.p50_s for each in latencies], marker="o", color=COLOURS[name], label=f"{NAMES[name]}, p50"
        )
        axes.plot(rates, [each.p95_s for each in latencies], marker="o", color=COLOURS[name], ls=":", label="p95")
    axes.set_xlabel("requests/s", fontsize=9)
    axes.set_title("seconds to the image", loc="left", fontsize=9)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.2)  # the legend's place
    axes.legend(fontsize=7, frameon=False, ncols=4)
