"""The comparison as a table: its cells, and Markdown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hqc.evaluation.comparison.rows import FID, PSNR, Comparison, Mean, Row
from hqc.wording import printable

__all__ = ["NOTHING", "Sheet", "markdown", "sheet_of"]

NOTHING = "–"
FLOAT = "float"


@dataclass(frozen=True)
class Sheet:
    """Heads, rows of cells, and lines underneath. The first `words` columns hold words, the others numbers."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Column:
    """A column: what a row shows there, and what the float model does."""

    head: str
    cell: Callable[[Row], str]
    of_float: str = NOTHING
    always: bool = False


def sheet_of(comparison: Comparison) -> Sheet:
    """The table; columns in which no row has anything are left out."""
    columns = [c for c in _columns(comparison) if c.always or any(c.cell(row) != NOTHING for row in comparison.rows)]
    rows = [tuple(column.of_float for column in columns)]
    rows += [tuple(printable(column.cell(row)) for column in columns) for row in comparison.rows]
    return Sheet(tuple(column.head for column in columns), tuple(rows), _notes(comparison))


def markdown(comparison: Comparison) -> str:
    """The table as Markdown, with its notes; ends in a newline."""
    sheet = sheet_of(comparison)
    lines = [_line(sheet.heads), "|" + "---|" * len(sheet.heads), *map(_line, sheet.rows)]
    return "\n".join([f"# Recipes on {printable(comparison.program)}", "", *lines, ""]) + "\n" + _bullets(sheet.notes)


def _bullets(notes: Sequence[str]) -> str:
    return "".join(f"- {printable(note)}\n" for note in notes)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# ---- columns ---------------------------------------------------------------------------------------------------------


def _bits(row: Row) -> str:
    """What was asked for, a16 where activations stayed float.

    >>> _bits(Row("ganq", "ptq", "w4a8", {0: {"weight_only": 20}}))
    'w4a16'
    """
    alone = any(figures.get("weight_only") for figures in row.figures.values())
    return f"{row.bits.partition('a')[0]}a16" if alone else row.bits


def _columns(comparison: Comparison) -> list[_Column]:
    """All that there may be."""
    score = _float_score(comparison)
    by = {FID: "FID", PSNR: "PSNR"}[comparison.ranked_by]
    return [
        _Column(f"rank by {by}", lambda row: NOTHING if row.rank is None else str(row.rank), always=True),
        _Column("recipe", lambda row: row.name, FLOAT, always=True),
        _Column("kind", lambda row: row.kind, always=True),
        _Column("bits", _bits, "fp32", always=True),
        _Column("MB by bits", _mean("size_bytes", 2, 1e-6), f"{comparison.float_bytes / 1e6:.2f}"),
        _Column("file MB", _mean("file_bytes", 2, 1e-6)),
        _Column("IS", _mean("inception_score", 2), _shown(score, 2)),
        _Column("ε gain", _mean("gain", 4), "1"),
        _Column("IS at gain 1", _mean("inception_score_gain_1", 2)),
        _Column("|IS/float − 1|", _mean("inception_score_deviation", 4), "0"),
        _Column("PSNR, dB", _mean(PSNR, 2), "∞"),
        _Column("SSIM", _mean("ssim", 4), "1"),
        _Column("FID to float", _mean(FID, 3), "0"),
        _Column("latent cosine, mean over steps", _mean("latent_cosine_mean", 4), "1"),
        _Column("accuracy, %", _mean("accuracy", 1, 100.0)),
        _Column("evaluations", _mean("evaluations", 0)),
        _Column("× its iterations", _mean("factor", 2)),
        _Column("seconds", _mean("seconds", 0)),
        _Column("integer sites in ORT", _integer_sites),
        _Column("ORT ms a step", _mean("ort_milliseconds", 1)),
        _Column("export error", _export_error),
        _Column("seeds", lambda row: _seeds(row, comparison.seeds), always=True),
        _Column("error", lambda row: next(iter(row.errors.values()), NOTHING)),
    ]


def _float_score(comparison: Comparison) -> Mean | None:
    """The float model's IS: the cells of one seed all have the same."""
    whole = max(comparison.rows, key=lambda row: len(row.figures), default=None)
    return None if whole is None else whole.mean("inception_score_reference")


def _mean(key: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: _shown(row.mean(key), digits, scale)


def _shown(mean: Mean | None, digits: int, scale: float = 1.0) -> str:
    """`mean ± deviation`, the second where there are several and they differ."""
    if mean is None or math.isnan(mean.value):
        return NOTHING
    if math.isinf(mean.value):
        return "∞"
    value = f"{scale * mean.value:,.{digits}f}".replace(",", " ")
    spread = f"{scale * mean.deviation:.{digits}f}"
    return f"{value} ± {spread}" if mean.count > 1 and mean.deviation > 0 else value


def _integer_sites(row: Row) -> str:
    figures = next(iter(row.figures.values()), None)
    if figures is None:
        return NOTHING
    refused = figures["export_refused"]
    return f"none: {refused}" if refused else f"{figures['integer_sites']} of {figures['sites']}"


def _export_error(row: Row) -> str:
    mean = row.mean("export_error")
    return NOTHING if mean is None else f"{mean.value:.1e}"


def _seeds(row: Row, wanted: int) -> str:
    done = len(row.figures)
    return str(done) if done == wanted else f"{done} of {wanted}"


# ---- lines underneath ------------------------------------------------------------------------------------------------


def _notes(comparison: Comparison) -> tuple[str, ...]:
    errors = [
        f"{row.name} {row.bits}, seed {seed} failed: {error}"
        for row in comparison.rows
        for seed, error in row.errors.items()
    ]
    return (*errors, *comparison.notes)
