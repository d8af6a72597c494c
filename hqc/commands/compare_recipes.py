"""The command that compares recipes on one program: compare-recipes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, asked, check_sampler
from hqc.commands.asking import Asked, asked_for, asking_options
from hqc.commands.options import (
    claim,
    force_option,
    json_option,
    program_argument,
    resumable,
    sampler_options,
    say_stage,
    work_folder,
)
from hqc.errors import OptionError
from hqc.stages import doing

if TYPE_CHECKING:
    from hqc.evaluation.comparison.budget import Budgets
    from hqc.evaluation.comparison.entries import Entry
    from hqc.evaluation.comparison.record import Record
    from hqc.evaluation.comparison.rows import Comparison
    from hqc.evaluation.comparison.subject import Protocol, Subject

__all__ = ["compare_recipes"]


@click.command(name="compare-recipes", cls=Command)
@program_argument
@click.option("--bits", required=True, metavar="wNaM,…", help="One or several: w4a4,w4a3.")
@click.option(
    "--recipes",
    required=True,
    metavar="NAMES",
    help="Comma-separated: names and .yaml files, with +hadamard to add the rotation or -hadamard to leave it out, "
    "and @plan.yaml for bits of single sites; all: every known one and rtn+hadamard.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="Seed k is added to the seeds of calibration and training, and draws images of seeds 1000·k and on.",
)
@click.option("--images", type=click.IntRange(1, 1000), default=1000, show_default=True, help="Of every seed.")
@click.option(
    "--budget-qat",
    type=click.FloatRange(1),
    metavar="EVALUATIONS",
    help="What recipes that train are scaled to, by iterations alone (default: what hq-dm costs).",
)
@click.option(
    "--budget-ptq",
    type=click.FloatRange(1),
    metavar="EVALUATIONS",
    help="The same for recipes that do not train and have iterations (default: they are not scaled).",
)
@click.option("--own-budgets", is_flag=True, help="Scale no recipe: each has the iterations of its own.")
@asking_options
@sampler_options
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The table as Markdown; written anew after every cell.",
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="The same with plots as one HTML file, at the end."
)
@click.option(
    "--chart",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The plots as .png or .svg, at the end.",
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keeps every stage, so that the same command goes on after it was killed (default: OUTPUT.work).",
)
@force_option
@json_option
def compare_recipes(
    program: Path,
    bits: str,
    recipes: str,
    seeds: int,
    images: int,
    budget_qat: float | None,
    budget_ptq: float | None,
    own_budgets: bool,
    labels: str | None,
    prompt: tuple[str, ...],
    prompts: Path | None,
    negative_prompt: str | None,
    output: Path,
    html: Path | None,
    chart: Path | None,
    work_dir: Path | None,
    force: bool,
    as_json: bool,
    **sampler: Any,
) -> None:
    """Quantise PROGRAM by several recipes with equal budgets, draw the same images from each, and rank them.

    A cell is a recipe at some bits with one seed. The first seed of every cell comes first. What is made is kept: the
    same command goes on where it was killed. A cell that fails is a row with its error, and exit status 1 at the end.
    """
    from hqc import console as out
    from hqc.evaluation.comparison.budget import Budgets
    from hqc.evaluation.comparison.entries import find_entries, require_widths
    from hqc.evaluation.comparison.run import compare_recipes as run
    from hqc.evaluation.workspace import Workspace

    entries, widths = find_entries(recipes), _widths(bits)
    require_widths(entries, widths)
    budgets = Budgets(budget_qat, budget_ptq, own=own_budgets)
    _check_budgets(entries, budgets)
    outputs = _Outputs(output, html, chart)
    outputs.check_drawing()
    asked_with = asked_for(labels, prompt, prompts, negative_prompt)
    folder = work_folder(work_dir, output, ".work")
    record = _record(program, folder, outputs, force=force)
    asked_with.check_kind(str(program))
    subject, protocol = _subject(program, asked_with, images, sampler)
    claim(folder, stays=True)
    record.begin()
    space = Workspace(folder, force=force, on_end=say_stage)

    def write(comparison: "Comparison", done: int, total: int) -> None:
        outputs.write_table(record, comparison)
        out.stderr.print(f"cell {done} of {total} is in {output}", markup=False, highlight=False)

    with resumable(folder):
        comparison = run(subject, entries, widths, protocol, space, seeds=seeds, budgets=budgets, on_cell=write)
    outputs.write_others(record, comparison)
    if as_json:
        out.print_json(comparison.to_dict())
    else:
        out.fields(f"compared recipes on {program}", {"table": output, **outputs.others})
    if comparison.failed:
        click.get_current_context().exit(1)


# ---- what is asked for -----------------------------------------------------------------------------------------------


def _widths(text: str) -> tuple[str, ...]:
    """w4a4,w4a3 -> each once.

    Raises:
        PlanError: for bits that are none.
    """
    from hqc.bits import parse_bits

    return tuple(dict.fromkeys(str(parse_bits(part)) for part in text.split(",")))


def _check_budgets(entries: "Sequence[Entry]", budgets: "Budgets") -> None:
    """Refuses a budget that scales nothing.

    Raises:
        OptionError: naming the option.
    """
    from hqc.evaluation.comparison.budget import iterates

    for kind in ("qat", "ptq"):
        if budgets.own and budgets.of(kind) is not None:
            raise OptionError("--own-budgets", f"was given with --budget-{kind}", "Give one of them.")
        scales = any(entry.recipe.kind == kind and iterates(entry.recipe) for entry in entries)
        if budgets.of(kind) is not None and not scales:
            raise OptionError(f"--budget-{kind}", f"no recipe of kind {kind} has iterations to scale", "Leave it out.")


def _subject(folder: Path, asked_with: Asked, images: int, sampler: dict[str, Any]) -> "tuple[Subject, Protocol]":
    """The program with its pipeline, and how its images are drawn."""
    from hqc import api
    from hqc.errors import PassError
    from hqc.evaluation.comparison.subject import Subject, protocol_of
    from hqc.evaluation.needs import needs_of
    from hqc.program import Stage
    from hqc.runtimes import load
    from hqc.sampling.task import require_steps
    from hqc.storage import load_program, pipeline_folder

    with doing(f"reading {folder}"):
        captured = load_program(folder)
    if captured.stage != Stage.CAPTURED:
        raise PassError(str(folder), f"is {captured.stage}; expected a captured program", "Give hqc trace's.")
    model = load(folder)
    pipe = model.pipeline()
    needs = needs_of(pipe)
    fitting = asked_with.sampler(needs, sampler, as_calibrated=True)
    require_steps(pipe.scheduler, sampler["num_inference_steps"])
    guidance = sampler["guidance_scale"] if asked("guidance_scale") else None
    task = api.task_of(captured, folder=pipeline_folder(folder), prompts=asked_with.prompts, guidance_scale=guidance)
    check_sampler(task, sampler)
    protocol = protocol_of(
        needs,
        type(pipe.scheduler).__name__,
        images,
        asked_with.rows(needs),
        fitting,
        asked_with.prompts,
        asked_with.negative_prompt,
    )
    return Subject(folder, captured, task, pipe, model.pipeline_folder), protocol


def _record(program: Path, folder: Path, outputs: "_Outputs", *, force: bool) -> "Record":
    """The work folder's record, once it is known to be this program's and every output may be written."""
    from hqc.atomic import refuse_nested
    from hqc.evaluation.comparison.record import Record
    from hqc.evaluation.comparison.subject import source_files

    source = source_files(program)
    refuse_nested(folder, program)
    record = Record(folder, source)
    record.check()
    for path in outputs.paths:
        record.check_output(path, force=force)
        claim(path, force=True)  # it is written again and again
    return record


# ---- what is written -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """The files that the table goes into."""

    table: Path
    html: Path | None
    chart: Path | None

    @property
    def others(self) -> dict[str, Path]:
        """Those besides the table that are asked for."""
        return {name: path for name, path in (("html", self.html), ("chart", self.chart)) if path is not None}

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.table, *self.others.values())

    def check_drawing(self) -> None:
        """Refuses a chart that is no picture, and plots without matplotlib."""
        from hqc.evaluation.drawing import require_drawing, require_picture

        if self.chart is not None:
            require_picture(self.chart)
        for name in self.others:
            require_drawing("matplotlib", f"--{name}")

    def write_table(self, record: "Record", comparison: "Comparison") -> None:
        """Writes the table anew."""
        from hqc.evaluation.comparison.table import markdown

        record.write(self.table, markdown(comparison).encode())

    def write_others(self, record: "Record", comparison: "Comparison") -> None:
        """Writes what is drawn: at the end, for it takes its time."""
        from hqc.evaluation.comparison.page import page
        from hqc.evaluation.comparison.plots import plots_bytes

        if self.html is not None:
            record.write(self.html, page(comparison).encode())
        if self.chart is not None:
            record.write(self.chart, plots_bytes(comparison, self.chart.suffix.lower().removeprefix(".")))
