"""Several models' figures, for the terminal and as Markdown: images, then trajectories, then the protocol."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hqc.evaluation.metrics import Metrics
from hqc.evaluation.trajectory_fidelity import USUAL_COSINE, TrajectoryFidelity

__all__ = ["ReportRow", "markdown_report", "protocol_lines", "terminal_report", "terminal_trajectories"]

NOTHING = "–"
COLUMNS = (
    "Model",
    "IS",
    "FID to float ↓",
    "FID to real ↓",
    "PSNR (dB) ↑",
    "SSIM ↑",
    "Latent cosine ↑",
    "Acc. (%) ↑",
    "Size (MB)",
    "Latency (ms)",
)
TRAJECTORY_COLUMNS = (
    "Model",
    "IS of float",
    "|IS/float − 1| ↓",
    "ε gain (1)",
    "IS at gain 1",
    "|IS at gain 1/float − 1| ↓",
    "Latent cosine, mean over steps ↑",
    "least ↑",
    f"mean ≥ {USUAL_COSINE:g}",
)
TWO_SIDED = (
    "IS rises with the gain of ε: one above float's is as wrong as one below it, and at gain 1 neither is flattered."
)
BY_TIMESTEP = "By timestep: ε gain on float's trajectory · cosine of the latents after the step with float's."


@dataclass(frozen=True)
class ReportRow:
    """One model in the table; what was not measured is None and shows as "–".

    Args:
        name: the model, as it should be printed.
        metrics: its figures.
        size_bytes: its size on disk; printed in MB of 10⁶ bytes.
        latency_ms: milliseconds per denoiser call, or whatever the caption beside the table says.
        trajectory: how it follows the float model through the sampler.
    """

    name: str
    metrics: Metrics | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None
    trajectory: TrajectoryFidelity | None = None


@dataclass(frozen=True)
class _Table:
    """Cells as they are printed; the first column is to the left. notes: lines underneath."""

    columns: tuple[str, ...]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


def terminal_report(rows: Sequence[ReportRow]) -> Group:
    """Rich tables with the protocol underneath; print them with `rich.console.Console().print`."""
    figures = _Table(COLUMNS, [_cells(row) for row in rows])
    return Group(_terminal(figures), terminal_trajectories(rows), *(Text(line) for line in protocol_lines(rows)))


def terminal_trajectories(rows: Sequence[ReportRow]) -> Group:
    """The tables of what models do along the sampler; empty where nothing of it was measured."""
    return Group(*(_terminal(table) for table in _trajectory_tables(rows)))


def markdown_report(rows: Sequence[ReportRow]) -> str:
    """The same tables as GitHub Markdown, with the protocol underneath; ends in a newline."""
    figures = _Table(COLUMNS, [_cells(row) for row in rows])
    tables = [_markdown(table) for table in (figures, *_trajectory_tables(rows))]
    return "\n\n".join([*tables, *protocol_lines(rows)]) + "\n"


def _terminal(table: _Table) -> Group:
    drawn = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)  # ten columns fit into 80 characters
    for column, name in enumerate(table.columns):
        longest_word = max(map(len, name.split()))
        justify: Literal["left", "right"] = "right" if column else "left"
        drawn.add_column(Text(name), justify=justify, overflow="fold", min_width=longest_word)
    for row in table.rows:
        drawn.add_row(*map(Text, row))  # Text: a name may hold [brackets]
    return Group(drawn, *map(Text, table.notes))


def _markdown(table: _Table) -> str:
    lines = [_markdown_row(table.columns), "|---|" + "---:|" * (len(table.columns) - 1)]
    lines += [_markdown_row(row) for row in table.rows]
    for note in table.notes:
        lines += ["", note]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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


def _trajectory_tables(rows: Sequence[ReportRow]) -> list[_Table]:
    """One row a model, then one row a timestep; columns and tables without a figure are left out."""
    cells = [_trajectory_cells(row) for row in rows]
    shown = [0, *(i for i in range(1, len(TRAJECTORY_COLUMNS)) if any(line[i] != NOTHING for line in cells))]
    if len(shown) == 1:
        return []
    columns = tuple(TRAJECTORY_COLUMNS[i] for i in shown)
    scored = any(row.metrics is not None for row in rows)
    table = _Table(columns, [[line[i] for i in shown] for line in cells], (TWO_SIDED,) if scored else ())
    return [table, *_timestep_tables([row for row in rows if row.trajectory is not None])]


def _timestep_tables(rows: Sequence[ReportRow]) -> list[_Table]:
    """A table for the models of each sampler: one row a step, one column a model."""
    grids: dict[tuple[float, ...], list[ReportRow]] = {}
    for row in rows:
        if row.trajectory is not None:
            grids.setdefault(row.trajectory.gain.timesteps, []).append(row)
    return [
        _Table(
            ("t", *(row.name for row in models)),
            [[f"{t:g}", *(_step_cell(row.trajectory, step) for row in models)] for step, t in enumerate(timesteps)],
            _timestep_notes(models),
        )
        for timesteps, models in grids.items()
    ]


def _step_cell(found: TrajectoryFidelity | None, step: int) -> str:
    if found is None:
        return NOTHING
    return f"{_number(found.gain.by_timestep[step], 4)} · {_number(found.cosine_by_timestep[step], 4)}"


def _timestep_notes(rows: Sequence[ReportRow]) -> tuple[str, ...]:
    measured = {f"{row.trajectory.num_images} images, seeds {row.trajectory.seeds}" for row in rows if row.trajectory}
    return (f"{BY_TIMESTEP[:-1]}; {'; '.join(sorted(measured))}.",)


def _trajectory_cells(row: ReportRow) -> list[str]:
    metrics, found = row.metrics, row.trajectory
    scores = [NOTHING] * 4
    if metrics is not None:
        scores = [
            _number(metrics.inception_score_reference, 2),
            _number(metrics.inception_score_deviation, 4),
            _number(metrics.inception_score_gain_1, 2),
            _number(metrics.inception_score_gain_1_deviation, 4),
        ]
        if metrics.inception_score_gain_1 is not None:
            scores[2] += f" ± {_number(metrics.inception_score_gain_1_std, 2)}"
    gain, cosines = NOTHING, [NOTHING] * 3
    if found is not None:
        passes = "yes" if found.mean_cosine >= USUAL_COSINE else "no"
        gain = _number(found.gain.overall, 4)
        cosines = [_number(found.mean_cosine, 4), _number(found.least_cosine, 4), passes]
    return [row.name, *scores[:2], gain, *scores[2:], *cosines]


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
