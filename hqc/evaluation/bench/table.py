"""The figures as a table; its lines are Markdown, so that it can be pasted into a README."""

from rich.box import MARKDOWN
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hqc.evaluation.bench.machine import machine_line
from hqc.evaluation.bench.result import BenchResult, Figures, spread

__all__ = ["bench_table"]

COLUMNS = ("model", "hqc is faster by", "ms, median (p10–p90)", "files, MB", "memory, MB", "load, s", "error to float")


def bench_table(result: BenchResult) -> Group:
    """The ratio first, one row a contender, ours on top; failures and the protocol underneath."""
    table = Table(box=MARKDOWN, pad_edge=True)
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for name, figures in result.contenders.items():
        table.add_row(*map(Text, _row(result, name, figures)))  # Text: a name may hold [brackets]
    for name in result.failed:
        table.add_row(*map(Text, (name, "failed", *["–"] * (len(COLUMNS) - 2))))
    return Group(table, *(Text(line) for line in ("", *_lines(result))))


def _row(result: BenchResult, name: str, figures: Figures) -> tuple[str, ...]:
    times = spread(figures.milliseconds)
    if name in result.peers:
        ratio = result.speedup(name)
        faster = f"{ratio.median:.2f}× ({ratio.p10:.2f}–{ratio.p90:.2f})"
    else:
        name, faster = f"hqc {result.quantisation}", "–"
    return (
        name,
        faster,
        f"{_milliseconds(times.median)} ({_milliseconds(times.p10)}–{_milliseconds(times.p90)})",
        f"{figures.size_bytes / 1e6:.1f}",
        f"{figures.memory_bytes / 1e6:.0f}",
        f"{figures.loaded.load_seconds:.2f}",
        f"{figures.error_to_float:.1e}",
    )


def _milliseconds(value: float) -> str:
    """A digit after the point; three below ten, where a GPU's differences are."""
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _lines(result: BenchResult) -> list[str]:
    protocol = result.protocol
    lines = [f"{name}: {reason}" for name, reason in result.failed.items()]
    lines += [f"{name}: {note}" for name, figures in result.contenders.items() for note in figures.notes]
    lines.append(
        f"{result.model}, batch {protocol['batch_size']}, {protocol['threads']} threads; {protocol['runs']} rounds "
        f"after {protocol['warm_up']} to warm up, one run of each in turn; calibration: {protocol['calibration']}."
    )
    lines.append(f"Ratios are medians of the rounds' ratios. Memory is {result.memory_note}.")
    lines.append(f"Machine: {machine_line(dict(result.machine))}.")
    return lines
