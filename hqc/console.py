"""What the command line prints: tables, progress bars with an ETA or lines (`stages`), JSON for machines."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hqc.plan import SitePlan
from hqc.program import Program
from hqc.stages import Stage, doing

__all__ = [
    "console",
    "fields",
    "late_progress",
    "print_json",
    "progress",
    "sites_table",
    "stderr",
]

console = Console(soft_wrap=True)
stderr = Console(stderr=True)


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")


def _bar() -> Progress:
    """Standard error, with an ETA; no bar where nobody looks."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    )


@contextmanager
def progress(what: str, total: int, *, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A progress bar, or where there is no terminal a line now and then; yields advance_to(completed, note)."""
    with doing(what, drawn=stderr.is_terminal) as stage, _bar() as bar:
        task = bar.add_task(what, total=total, completed=done, note="")
        stage(done, total)

        def advance(completed: int, note: str = "") -> None:
            bar.update(task, completed=completed, note=note)
            stage(completed, total, note)

        yield advance


@contextmanager
def late_progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A `progress` that is there once its length is known, until its end; yields advance_to(completed, total, note)."""
    with _bar() as bar, ExitStack() as stack:
        stages: list[Stage] = []

        def advance(completed: int, total: int, note: str = "") -> None:
            task = bar.task_ids[0] if bar.task_ids else bar.add_task(what, note=note)
            bar.update(task, completed=completed, total=total, note=note)
            if not stages:
                stages.append(stack.enter_context(doing(what, drawn=stderr.is_terminal)))
            stages[0](completed, total, note)
            if completed >= total:
                stack.close()

        yield advance


def fields(title: str, values: dict[str, Any]) -> None:
    """A short list of named values."""
    console.print(title, style="bold")
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        console.print(f"  {key:<{width}}  {value}", markup=False, highlight=False)


def sites_table(program: Program) -> Table:
    """One row a site: bits (a star where the range is asymmetric), rotation, LoRA rank, the reason of exceptions.

    Where some are smoothed or have a branch there is a column for that.
    """
    table = Table(title=f"{program.plan.recipe or 'plan'} {program.plan.bits}", title_justify="left")
    beside = any(map(_beside, program.plan.sites))
    columns = ["site", "kind", "in", "out", "bits", "rotation", "LoRA", *(["beside"] if beside else []), "note"]
    for column in columns:
        table.add_column(column, justify="right" if column in ("in", "out", "LoRA") else "left", overflow="fold")
    for plan in program.plan.sites:
        *before, note = _row(plan)
        shown = [*before, *([_beside(plan) or "–"] if beside else []), note]
        table.add_row(*map(Text, shown))  # Text: a pattern may hold [brackets]
    return table


def _beside(plan: SitePlan) -> str:
    """What is float around a site's product."""
    parts = ["smoothed, shifted" if plan.shifted else "smoothed"] if plan.smoothed else []
    return ", ".join([*parts, *([f"branch {plan.branch_rank}"] if plan.branch_rank else [])])


def _row(plan: SitePlan) -> tuple[str, ...]:
    rotation = plan.rotation_name or "–"
    rank = str(plan.lora_rank) if plan.lora_rank else "–"
    return plan.site, plan.kind, str(plan.in_channels), str(plan.out_channels), plan.widths, rotation, rank, plan.reason
