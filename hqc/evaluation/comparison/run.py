"""`compare_recipes`: every recipe at every width with every seed, the first seed of all of them first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hqc.errors import HqcError
from hqc.evaluation.bench.machine import describe_machine
from hqc.evaluation.comparison.budget import Budgets, Scaled, default_budget, scaled
from hqc.evaluation.comparison.cells import Cell, Maker
from hqc.evaluation.comparison.entries import Entry
from hqc.evaluation.comparison.notes import notes_of
from hqc.evaluation.comparison.rows import FID, PSNR, Comparison, Row, ranked
from hqc.evaluation.comparison.subject import Protocol, Subject
from hqc.evaluation.workspace import Workspace

__all__ = ["compare_recipes"]

OnCell = Callable[[Comparison, int, int], None]


def compare_recipes(
    subject: Subject,
    entries: Sequence[Entry],
    bits: Sequence[str],
    protocol: Protocol,
    space: Workspace,
    *,
    seeds: int = 3,
    budgets: Budgets | None = None,
    on_cell: OnCell = lambda comparison, done, total: None,
) -> Comparison:
    """Makes and measures every cell; one that fails is a row with its error.

    budgets: None is the default one. on_cell: hears of the table so far, and how many cells of how many are done.

    Raises:
        HqcError: only what keeps every cell from being made.
    """
    budgets = _budgets(subject, entries, bits[0], budgets or Budgets())
    found = [(entry, _scaled(subject, entry, entry.plan.bits or bits[0], budgets)) for entry in entries]
    notes = notes_of(protocol, seeds, subject.task.drawn_from, budgets, [(entry.name, one) for entry, one in found])
    by = FID if protocol.scored else PSNR
    empty = Comparison(subject.path.name, (), seeds, by, subject.program.size_bytes(), notes, _data(protocol, budgets))
    maker, rows = Maker(subject, protocol, space), dict[tuple[str, str], Row]()
    pairs = [(width, entry, one) for width in bits for entry, one in found if entry.fits(width)]
    cells = [(seed, *pair) for seed in range(seeds) for pair in pairs]
    comparison = empty
    for done, (seed, width, entry, one) in enumerate(cells, 1):
        row = rows.get((entry.name, width), Row(entry.name, entry.recipe.kind, width))
        rows[entry.name, width] = _with_cell(row, maker, entry, one, seed)
        comparison = replace(empty, rows=ranked(list(rows.values()), by))
        on_cell(comparison, done, len(cells))
    return comparison


def _budgets(subject: Subject, entries: Sequence[Entry], bits: str, asked: Budgets) -> Budgets:
    """With what recipes that train are scaled to where nothing is asked for."""
    if asked.own or asked.qat is not None or all(entry.recipe.kind != "qat" for entry in entries):
        return asked
    return replace(asked, qat=default_budget(subject.program, subject.task, bits), is_default=True)


def _scaled(subject: Subject, entry: Entry, bits: str, budgets: Budgets) -> Scaled | HqcError:
    """A recipe as its budget has it, or why it has none."""
    try:
        return scaled(
            subject.program, entry.recipe, subject.task, bits, budgets.of(entry.recipe.kind), entry.plan.rules
        )
    except HqcError as error:
        return error


def _with_cell(row: Row, maker: Maker, entry: Entry, found: Scaled | HqcError, seed: int) -> Row:
    """The row with the figures of one more seed, or its error."""
    if isinstance(found, HqcError):
        return replace(row, errors={**row.errors, seed: found.line})
    try:
        figures = maker.figures(Cell(entry, found, row.bits, seed))
    except HqcError as error:
        return replace(row, errors={**row.errors, seed: error.line})
    return replace(row, figures={**row.figures, seed: figures})


def _data(protocol: Protocol, budgets: Budgets) -> Mapping[str, Any]:
    """What the figures were measured with, for machines."""
    return {
        "protocol": protocol.to_dict(),
        "why_unscored": protocol.why_unscored or None,
        "budgets": {"qat": budgets.qat, "ptq": budgets.ptq},
        "machine": describe_machine(),
    }
