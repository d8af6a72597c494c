"""Commands that quantise a Program: ptq and qat."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, asked, check_sampler
from hqc.commands.exportable import warn_unless_exportable
from hqc.commands.options import (
    bits_option,
    check_output,
    claim,
    condition_options,
    conditions_asked,
    force_option,
    json_option,
    keep_float_option,
    options,
    output_option,
    plan_option,
    program_argument,
    work_folder,
)
from hqc.commands.recipe_options import (
    plan_and_bits,
    recipe_asked,
    recipe_options,
    sampler_of_recipe_options,
    with_sampler,
)
from hqc.stages import doing

if TYPE_CHECKING:
    from hqc.processes import Processes
    from hqc.program import Program
    from hqc.recipes import Recipe
    from hqc.recipes.plan_file import PlanFile
    from hqc.recipes.work_folder import Run
    from hqc.sampling import Task, Update

__all__ = ["ptq", "qat"]

_quantising_options = options(
    bits_option,
    recipe_options,
    plan_option,
    keep_float_option,
    click.option(
        "--calib-size", type=click.IntRange(1, 4096), help="Images to calibrate activations on (default: the recipe's)."
    ),
    condition_options,
    click.option(
        "--images",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Images that the pipeline restores in one step: what PROGRAM, a part of it, is calibrated and trained on.",
    ),
    click.option(
        "--through",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="PROGRAM",
        help="A quantised part of the pipeline that comes before PROGRAM: the images run through it; may repeat.",
    ),
    sampler_of_recipe_options,
)
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
_work_options = options(
    click.option(
        "--work-dir",
        type=click.Path(path_type=Path),
        help="Log, checkpoints, and the program after every long step (qat: OUTPUT.training by default).",
    ),
    click.option("--resume", is_flag=True, help="Continue the run in the work folder, to the same bits."),
    click.option("--restart", is_flag=True, help="Drop the unfinished run in the work folder and begin anew."),
)


@click.command(cls=Command)
@program_argument
@output_option
@click.option("--recipe", default="rtn", show_default=True, metavar="NAME|FILE.yaml")
@_quantising_options
@_work_options
@force_option
@json_option
def ptq(program: Path, output: Path, work_dir: Path | None, as_json: bool, **given: Any) -> None:
    """Quantise PROGRAM without training: the baseline that every gain is measured against."""
    job = _job("ptq", program, output, given, work_dir)
    result = _quantised(job)
    _say(job, result, {}, f"quantised {program}", as_json=as_json)


@click.command(cls=Command)
@program_argument
@output_option
@click.option("--recipe", default="hqc", show_default=True, metavar="NAME|FILE.yaml")
@_quantising_options
@_training_options
@_work_options
@force_option
@json_option
def qat(program: Path, output: Path, work_dir: Path | None, as_json: bool, **given: Any) -> None:
    """Quantise PROGRAM and train it against itself: scales and LoRA, merged before export.

    Started by torchrun or accelerate launch as several processes (docs/training.md), it trains on a share of every
    batch in each; the first writes and prints.
    """
    from hqc.processes import joined, quiet_unless_first

    with quiet_unless_first(), joined() as processes:
        job = _job("qat", program, output, given, work_folder(work_dir, output, ".training"), processes)
        result = _quantised(job)
    if not processes.first:
        return
    run = job.kept
    more = {"updates": job.updates, "last_loss": run.last_loss(), "log": str(run.log_path)} if run is not None else {}
    _say(job, result, more, f"trained {program}", as_json=as_json)


# ---- what both commands do -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A program to quantise, how, what to calibrate it on, and where the result goes."""

    captured: "Program"
    recipe: "Recipe"
    bits: str
    plan: "PlanFile"
    keep_float: tuple[str, ...]
    task: "Task"
    output: Path
    pipeline: Path | None
    force: bool
    kept: "Run | None"
    resume: bool
    restart: bool
    processes: "Processes"

    @property
    def updates(self) -> int:
        """Of the recipe's training, all in all."""
        from hqc.sampling import Work

        work = Work(self.captured, self.task, self.recipe.sampler)
        return sum(step.total(work) for step in self.recipe.steps if hasattr(step, "total"))


def _job(
    kind: str,
    program: Path,
    output: Path,
    given: dict[str, Any],
    work_dir: Path | None,
    processes: "Processes | None" = None,
) -> _Job:
    """Checks and loads what both commands take. Of several processes the first alone claims what is written."""
    from hqc import api
    from hqc.processes import ALONE
    from hqc.recipes.work_folder import Run
    from hqc.storage import load_program, pipeline_folder

    processes = processes or ALONE
    force, resume, restart = (given.pop(name) for name in ("force", "resume", "restart"))
    run = Run(work_dir, writes=processes.first) if work_dir is not None else None
    if processes.first:
        _check_work_folder(run, program, output, resume=resume, restart=restart)
        check_output(output, program, force=force, may_be_there=resume)
    conditions, images, through = conditions_asked(given), given.pop("images"), given.pop("through")
    recipe = _recipe(kind, given)
    (plan, bits), keep_float = plan_and_bits(given), given.pop("keep_float")
    recipe = recipe.following(plan.rules)
    with doing(f"reading {program}"):
        captured, pipeline = load_program(program), pipeline_folder(program)
    if processes.first:
        warn_unless_exportable(captured, program)
    guidance = recipe.sampler.guidance_scale if asked("guidance_scale") else None
    parts = [load_program(one) for one in through]
    once = {"images": images, "through": parts, "timestep": recipe.sampler.timestep}
    task = api.task_of(captured, folder=pipeline, guidance_scale=guidance, **conditions, **once)
    check_sampler(task, {"guidance_scale": recipe.sampler.guidance_scale, "eta": recipe.sampler.eta})
    more = (output, pipeline, force, run, resume, restart, processes)
    return _Job(captured, recipe, bits, plan, keep_float, task, *more)


def _recipe(kind: str, given: dict[str, Any]) -> "Recipe":
    """The recipe that the options ask for, of the command's kind.

    Raises:
        PlanError: if it is of the other kind.
    """
    from hqc.errors import PlanError
    from hqc.steps import typed_option
    from hqc.training import Group

    recipe = recipe_asked(given.pop("recipe"), given)
    if recipe.kind != kind:
        do = "Use hqc qat, or --recipe rtn here." if kind == "ptq" else "Use hqc ptq for it, or --recipe hq-dm here."
        found = "needs training" if kind == "ptq" else "does not train"
        raise PlanError(f"recipe {recipe.name!r}", found, do)
    recipe = with_sampler(recipe, given)
    if (size := given.pop("calib_size")) is not None:
        recipe = recipe.set("calibrate_activations.samples", size)
    if kind == "ptq":
        return recipe
    rates = {
        "--lr-lora": ("lora_a", given.pop("lr_lora")),
        "--lr-weight-scale": ("weight_scale", given.pop("lr_weight_scale")),
        "--lr-activation-scale": ("activation_scale_table", given.pop("lr_activation_scale")),
    }
    changes = {
        "distil.epochs": given["epochs"],
        "distil.updates": given["steps"],
        "distil.batch_size": given["batch_size"],
        "distil.seed": given["seed"],
        "distil.checkpoint_every": given["checkpoint_every"],
        "attach_lora.seed": given["seed"] if recipe.step("attach_lora") is not None else None,
    }
    for path, value in changes.items():
        recipe = recipe if value is None else recipe.set(path, value)
    for option, (leaf, rate) in rates.items():
        recipe = recipe if rate is None else recipe.with_rate(leaf, typed_option(option, Group, "rate", rate))
    return recipe


def _check_work_folder(run: "Run | None", program: Path, output: Path, *, resume: bool, restart: bool) -> None:
    """Claims the work folder, and refuses one that may not be used, before long work starts."""
    from hqc.atomic import refuse_nested
    from hqc.errors import ArtefactError, OptionError

    if resume and restart:
        raise ArtefactError("--resume", "and --restart exclude each other", "Give one of them.")
    if run is None:
        if resume or restart:
            raise OptionError("--resume" if resume else "--restart", "needs --work-dir", "Give the run's work folder.")
        return
    if run.owns(output) or output.resolve() in run.folder.resolve().parents:
        raise ArtefactError(
            f"--work-dir {run.folder}", f"and the output {output} overlap", "Choose a folder beside the output."
        )
    refuse_nested(run.folder, program)
    claim(run.folder, stays=True)
    if not resume:
        run.check_new(restart=restart)


def _quantised(job: _Job) -> "Program":
    """Runs the job and saves the result; what is kept to resume is dropped afterwards."""
    from hqc import api
    from hqc import console as out

    run = job.kept
    if job.resume and not job.force and os.path.lexists(job.output):
        result = _finished(job)
    else:
        bar = out.progress(f"{job.recipe.name} {job.bits}", job.updates) if job.updates else nullcontext(_silent)
        with _how_to_go_on(run), bar as advance:
            result = api.quantise(
                job.captured,
                job.recipe,
                job.bits,
                task=job.task,
                keep_float=job.keep_float,
                plan=job.plan,
                work_dir=None if run is None else run.folder,
                resume=job.resume,
                restart=job.restart,
                on_update=_told(advance),
                processes=job.processes,
            )
            if job.processes.first:
                _save(job, result)
    if run is not None and job.processes.first:
        api.finish_run(run.folder)
    return result


def _told(advance: Callable[[int, str], object]) -> "Callable[[Update], None]":
    """Moves a bar by the updates of one step after the other: each counts its own from 1."""
    before, last = 0, (0, 0)

    def hear(update: "Update") -> None:
        nonlocal before, last
        step, total = last
        before += total if update.step <= step else 0
        last = (update.step, update.total)
        advance(before + update.step, f"loss {update.loss:.4g}")

    return hear


def _silent(done: int, note: str) -> None:
    """Nothing is trained: there is no bar to move."""


def _finished(job: _Job) -> "Program":
    """The result that a run with these settings has saved: it was killed before it tidied up.

    Raises:
        ArtefactError: if something else is there.
    """
    from hqc.atomic import refuse_existing
    from hqc.errors import ArtefactError
    from hqc.program import Stage
    from hqc.recipes.run import Request, run_settings
    from hqc.storage import load_program

    try:
        result = load_program(job.output)
    except ArtefactError:
        refuse_existing(job.output, force=False)
        raise
    request = Request(job.bits, job.keep_float, rules=job.plan.rules)
    settings = run_settings(job.captured, job.recipe, request, job.task.drawn_from, job.processes.count)
    stage = Stage.TRAINED if job.recipe.kind == "qat" else Stage.QUANTISED
    if result.stage != stage or dict(result.plan.training) != settings:
        refuse_existing(job.output, force=False)
    return result


@contextmanager
def _how_to_go_on(run: "Run | None") -> Iterator[None]:
    """Says after Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        if run is not None and run.unfinished:
            click.echo(f"hqc: interrupted; the same command with --resume goes on from {run.folder}", err=True)
        raise


def _save(job: _Job, result: "Program") -> None:
    from hqc.storage import save_program

    with doing(f"writing {job.output}"):
        save_program(result, job.output, force=job.force, pipeline=job.pipeline)


def _say(job: _Job, result: "Program", more: dict[str, Any], title: str, *, as_json: bool) -> None:
    """What was made."""
    from hqc import console as out

    summary = {
        "program": str(job.output),
        "sites": len(result.plan.coded),
        "bits": job.bits,
        "calibrated_on": job.task.drawn_from,
        **more,
    }
    out.print_json(summary) if as_json else out.fields(title, summary)
