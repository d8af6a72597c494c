"""One table of several models' figures, for the terminal and as Markdown, with the protocol underneath."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hqc.evaluation.metrics import Metrics

__all__ = ["ReportRow", "markdown_report", "protocol_lines", "terminal_report"]

NOTHING = "–"
COLUMNS = (
    "Model",
    "IS ↑",
    "FID to float ↓",
    "FID to real ↓",
    "PSNR (dB) ↑",
    "SSIM ↑",
    "Latent cosine ↑",
    "Acc. (%) ↑",
    "Size (MB)",
    "Latency (ms)",
)


@dataclass(frozen=True)
class ReportRow:
    """One model in the table; what was not measured is None and shows as "–".

    Args:
        name: the model, as it should be printed.
        metrics: its figures.
        size_bytes: its size on disk; printed in MB of 10⁶ bytes.
        latency_ms: milliseconds per denoiser call, or whatever the caption beside the table says.
    """

    name: str
    metrics: Metrics | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None


def terminal_report(rows: Sequence[ReportRow]) -> Group:
    """A rich table with the protocol underneath; print it with `rich.console.Console().print`."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)  # ten columns fit into 80 characters
    for column, name in enumerate(COLUMNS):
        longest_word = max(map(len, name.split()))
        table.add_column(name, justify="right" if column else "left", overflow="fold", min_width=longest_word)
    for row in rows:
        table.add_row(*(Text(cell) for cell in _cells(row)))  # Text: a name may hold [brackets]
    return Group(table, *(Text(line) for line in protocol_lines(rows)))


def markdown_report(rows: Sequence[ReportRow]) -> str:
    """The same table as GitHub Markdown, with the protocol underneath; ends in a newline."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in rows]
    for line in protocol_lines(rows):
        lines += ["", line]
    return "\n".join(lines) + "\n"


def protocol_lines(rows: Sequence[ReportRow]) -> list[str]:
    """What the figures were measured with: one line, or where they differ one for each with its models."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.metrics is not None:
            names.setdefault(_protocol_text(row.metrics), []).append(row.name)
    if len(names) <= 1:
        return [f"Protocol: {text}." for text in names]
    return [f"Protocol of {', '.join(models)}: {text}." for text, models in names.items()]


def _protocol_text(metrics: Metrics) -> str:
    protocol = metrics.protocol
    parts = [
        f"{protocol['sampler']}",
        f"{protocol['num_inference_steps']} steps",
        f"guidance {protocol['guidance_scale']}",
        f"η {protocol['eta']}",
        f"{protocol['num_images']} images of {protocol['image_size']}",
        f"seeds {protocol['seeds']}",
        f"features from {protocol['feature_extractor']}",
        f"image range {protocol['image_range']}",
        f"IS over {protocol['splits']} splits",
    ]
    if protocol["num_real_images"] is not None:
        parts.append(f"{protocol['num_real_images']} real images")
    return "; ".join(parts)


def _cells(row: ReportRow) -> list[str]:
    size_mb = None if row.size_bytes is None else row.size_bytes / 1e6
    if row.metrics is None:
        figures = [NOTHING] * 7
    else:
        metrics, near = row.metrics, row.metrics.fidelity
        figures = [
            f"{_number(metrics.inception_score, 2)} ± {_number(metrics.inception_score_std, 2)}",
            _number(metrics.fid_reference, 2),
            _number(metrics.fid_real, 2),
            _number(near.psnr_db, 2),
            _number(near.ssim, 4),
            _number(near.latent_cosine, 4),
            _number(100 * metrics.accuracy, 1),
        ]
    return [row.name, *figures, _number(size_mb, 2), _number(row.latency_ms, 1)]


def _number(value: float | None, digits: int) -> str:
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.{digits}f}"
