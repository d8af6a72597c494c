"""Commands that quantise a Program: ptq and qat."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, asked, check_sampler
from hqc.commands.exportable import warn_unless_exportable
from hqc.commands.options import (
    check_output,
    claim,
    conditions_asked,
    force_option,
    json_option,
    options,
    output_option,
    program_argument,
    quantising_options,
    rotation_order,
)
from hqc.stages import doing

if TYPE_CHECKING:
    from hqc.program import Program
    from hqc.recipes import Recipe, TrainingSettings
    from hqc.sampling import Task
    from hqc.training.run import Run

__all__ = ["ptq", "qat"]

_training_options = options(
    click.option("--epochs", type=click.IntRange(1), help="Trajectories (default: the recipe's)."),
    click.option("--steps", type=click.IntRange(1), help="Updates in all, instead of --epochs."),
    click.option("--batch-size", type=click.IntRange(1, 1024), help="Images of a trajectory."),
    click.option("--seed", type=click.IntRange(0, 2**31), help="Of the training trajectories and LoRA."),
    click.option("--lr-lora", type=float, help="LoRA learning rate over the site's mean weight scale."),
    click.option("--lr-weight-scale", type=float),
    click.option("--lr-activation-scale", type=float),
    click.option("--checkpoint-every", type=click.IntRange(1), help="Updates between checkpoints."),
)


@click.command(cls=Command)
@program_argument
@output_option
@click.option("--recipe", default="rtn", show_default=True)
@click.option("--hadamard", is_flag=True, help="Rotate activations before quantising.")
@quantising_options
@force_option
@json_option
def ptq(program: Path, output: Path, hadamard: bool, force: bool, as_json: bool, **given: Any) -> None:
    """Quantise PROGRAM without training: the baseline that every gain is measured against."""
    from hqc import api

    job = _job(program, output, given, force=force, rotated=hadamard)
    result = api.ptq(
        job.captured,
        job.recipe,
        job.bits,
        hadamard=hadamard,
        block=job.block,
        task=job.task,
        keep_float=job.keep_float,
    )
    _save(job, result)
    _say(job, result, {}, f"quantised {program}", as_json=as_json)


@click.command(cls=Command)
@program_argument
@output_option
@click.option("--recipe", default="hq-dm", show_default=True)
@click.option("--no-hadamard", is_flag=True, help="The same training without rotation (the method's ablation).")
@quantising_options
@_training_options
@click.option("--work-dir", type=click.Path(path_type=Path), help="Log and checkpoints (default: OUTPUT.training).")
@click.option("--resume", is_flag=True, help="Continue the run in the work folder, to the same bits.")
@click.option("--restart", is_flag=True, help="Drop the unfinished run in the work folder and begin anew.")
@force_option
@json_option
def qat(
    program: Path,
    output: Path,
    no_hadamard: bool,
    work_dir: Path | None,
    resume: bool,
    restart: bool,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Quantise PROGRAM and train it against itself: scales and LoRA, merged before export."""
    from hqc import api
    from hqc import console as out
    from hqc.training.run import Run

    folder = work_dir or output.with_name(output.name + ".training")
    run = Run(folder)
    _check_work_folder(run, program, output, resume=resume, restart=restart)
    job = _job(program, output, given, force=force, rotated=False if no_hadamard else None, resume=resume)
    recipe, updates = api.configure(job.recipe, block=job.block), job.recipe.training.total_steps
    if resume and not force and os.path.lexists(output):
        result = _finished(job, recipe)
    else:
        with _how_to_go_on(run), out.progress(f"{recipe.name} {job.bits}", updates) as advance:
            result = api.qat(
                job.captured,
                recipe,
                job.bits,
                task=job.task,
                keep_float=job.keep_float,
                work_dir=folder,
                resume=resume,
                restart=restart,
                on_step=lambda record: advance(record.step, f"loss {record.loss:.4g}"),
            )
            _save(job, result)
    api.finish_run(folder)
    more = {"updates": updates, "last_loss": run.last_loss(), "log": str(run.log_path)}
    _say(job, result, more, f"trained {program}", as_json=as_json)


def _check_work_folder(run: "Run", program: Path, output: Path, *, resume: bool, restart: bool) -> None:
    """Claims the work folder, and refuses one that may not be used, before long work starts."""
    from hqc.atomic import refuse_nested
    from hqc.errors import ArtefactError

    if resume and restart:
        raise ArtefactError("--resume", "and --restart exclude each other", "Give one of them.")
    place, folder = output.resolve(), run.folder.resolve()
    own = [path.resolve() for path in (run.folder, run.quantised, run.checkpoint, run.log_path)]
    if place in (*own, *folder.parents):
        raise ArtefactError(
            f"--work-dir {run.folder}", f"and the output {output} overlap", "Choose a folder beside the output."
        )
    refuse_nested(run.folder, program)
    claim(run.folder, stays=True)
    if not resume:
        run.check_new(restart=restart)


def _finished(job: "_Job", recipe: "Recipe") -> "Program":
    """The result that a run with these settings has saved: it was killed before it tidied up.

    Raises:
        ArtefactError: if something else is there.
    """
    from hqc.atomic import refuse_existing
    from hqc.errors import ArtefactError
    from hqc.program import Stage
    from hqc.storage import load_program
    from hqc.training.run import run_settings

    try:
        result = load_program(job.output)
    except ArtefactError:
        refuse_existing(job.output, force=False)
        raise
    settings = run_settings(job.captured, recipe, job.bits, job.keep_float, job.task)
    if result.stage != Stage.TRAINED or dict(result.plan.training) != settings:
        refuse_existing(job.output, force=False)
    return result


@contextmanager
def _how_to_go_on(run: "Run") -> Iterator[None]:
    """Says after Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        if run.unfinished:
            click.echo(f"hqc: interrupted; the same command with --resume goes on from {run.folder}", err=True)
        raise


# ---- what both commands do -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A program to quantise, how, what to calibrate it on, and where the result goes.

    block: the rotation's order, 0 without one.
    """

    captured: "Program"
    recipe: "Recipe"
    block: int
    bits: str
    keep_float: tuple[str, ...]
    task: "Task"
    output: Path
    pipeline: Path | None
    force: bool


def _job(
    program: Path,
    output: Path,
    given: dict[str, Any],
    *,
    force: bool,
    rotated: bool | None,
    resume: bool = False,
) -> _Job:
    """Checks and loads what both commands take; what is left of `given` are training settings.

    rotated: None asks the recipe. resume: the result may be there already.
    """
    from hqc import api
    from hqc.storage import load_program, pipeline_folder

    check_output(output, program, force=force, may_be_there=resume)
    conditions = conditions_asked(given)
    recipe = api.configure(given.pop("recipe"), rules=given.pop("rules"))
    block = rotation_order(given.pop("block"), rotated=bool(recipe.block) if rotated is None else rotated)
    bits, keep_float = given.pop("bits").lower(), given.pop("keep_float")
    sampler = {name: given[name] for name in ("guidance_scale", "eta")}
    calibration = recipe.calibration.model_copy(update={"samples": given.pop("calib_size")})
    recipe = recipe.model_copy(update={"calibration": calibration, "training": _training(recipe.training, given)})
    with doing(f"reading {program}"):
        captured, pipeline = load_program(program), pipeline_folder(program)
    warn_unless_exportable(captured, program)
    guidance = recipe.training.guidance_scale if asked("guidance_scale") else None
    task = api.task_of(captured, folder=pipeline, guidance_scale=guidance, **conditions)
    check_sampler(task, sampler)
    return _Job(captured, recipe, block, bits, keep_float, task, output, pipeline, force)


def _save(job: _Job, result: "Program") -> None:
    from hqc.storage import save_program

    with doing(f"writing {job.output}"):
        save_program(result, job.output, force=job.force, pipeline=job.pipeline)


def _say(job: _Job, result: "Program", more: dict[str, Any], title: str, *, as_json: bool) -> None:
    """What was made."""
    from hqc import console as out

    summary = {
        "program": str(job.output),
        "sites": len(result.plan.quantised),
        "bits": job.bits,
        "calibrated_on": job.task.drawn_from,
        **more,
    }
    out.print_json(summary) if as_json else out.fields(title, summary)


def _training(defaults: "TrainingSettings", given: dict[str, Any]) -> "TrainingSettings":
    from pydantic import ValidationError

    from hqc.errors import PlanError

    values = defaults.model_dump() | {key: value for key, value in given.items() if value is not None}
    try:
        return type(defaults)(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-")
        raise PlanError(name, f"{first['input']!r}: {first['msg']}", "Give a value in range.") from error
