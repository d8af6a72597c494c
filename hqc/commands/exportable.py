"""What the command line says about targets before any long work: which take a program, and what none of them takes."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hqc.export.surveys import Survey
    from hqc.program import Program

__all__ = ["print_survey", "warn_unless_exportable"]


def warn_unless_exportable(program: "Program", folder: Path) -> list[str]:
    """The targets that take a program; where there is none, a line on standard error says what is in the way.

    folder: where the program lies, for the line.
    """
    from hqc.errors import LONGEST_LINE
    from hqc.export.surveys import survey_targets
    from hqc.wording import printable, shortened

    surveys = survey_targets(program)
    takers: list[str] = [found.target for found in surveys if not found.obstacles]
    if not takers:
        more = f" `hqc explain --target {surveys[0].target} {folder}` lists everything."
        said = printable(f"hqc: warning: no export target takes this program: {surveys[0].obstacles[0]}")
        click.echo(shortened(said, LONGEST_LINE - len(more)) + more, err=True)
    return takers


def print_survey(program: Path, found: "Survey", *, as_json: bool) -> None:
    """What a target takes and what it does not; exit status 1 where there is something that it does not."""
    from hqc import console as out

    if as_json:
        out.print_json({"program": str(program), **found.to_dict()})
    else:
        out.fields(f"target {found.target} takes of {program}", dict(found.taken))
        if found.attention:
            out.console.print(f"attention {found.attention}", markup=False, highlight=False)
        for obstacle in found.obstacles:
            out.console.print(f"does not take {obstacle}", markup=False, highlight=False)
    if found.obstacles:
        click.get_current_context().exit(1)
