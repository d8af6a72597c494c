"""The command that chooses bits for every layer: search."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, asked, check_sampler
from hqc.commands.options import (
    check_output_file,
    claim,
    condition_options,
    conditions_asked,
    force_option,
    json_option,
    keep_float_option,
    options,
    program_argument,
    resumable,
    work_folder,
)
from hqc.commands.recipe_options import recipe_asked, recipe_options, sampler_of_recipe_options, with_sampler
from hqc.stages import doing

if TYPE_CHECKING:
    from hqc.program import Program
    from hqc.recipes import Recipe
    from hqc.sampling import Task
    from hqc.search import Found

__all__ = ["Measured", "kept_option", "measured_on", "measuring_options", "search", "sensitivity_options"]

sensitivity_options = options(
    click.option(
        "--candidates",
        metavar="wNaM,…",
        help="What a site may have (default: w4a8,w8a8 for bytes of files, w2…w8 with a8 for bytes by bits, "
        "combinations of a4 to a8 for bit operations).",
    ),
    click.option("--samples", type=click.IntRange(1, 1024), default=4, show_default=True, help="Images at a timestep."),
    click.option("--timesteps", type=click.IntRange(1, 1000), default=4, show_default=True, help="That are measured."),
    click.option("--seed", type=click.IntRange(0, 2**31), default=2024, show_default=True, help="Of the images."),
)

measuring_options = options(
    recipe_options,
    keep_float_option,
    click.option(
        "--calib-size", type=click.IntRange(1, 4096), help="Images to calibrate activations on (default: the recipe's)."
    ),
    condition_options,
    sampler_of_recipe_options,
)
kept_option = click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keeps all that is measured: the same command goes on after it was killed (default: OUTPUT.work).",
)


@dataclass(frozen=True)
class Measured:
    """What a search measures, by which recipe, and where it keeps that."""

    program: "Program"
    task: "Task"
    recipe: "Recipe"
    candidates: tuple[str, ...]
    folder: Path


def measured_on(path: Path, output: Path, given: dict[str, Any]) -> Measured:
    """Checks and loads what searches take."""
    from hqc import api
    from hqc.atomic import refuse_nested
    from hqc.search.run import parse_candidates
    from hqc.storage import load_program, pipeline_folder

    candidates = given["candidates"]
    widths = () if candidates is None else parse_candidates(candidates)
    folder = work_folder(given["work_dir"], output, ".work")
    conditions = conditions_asked(given)
    recipe = with_sampler(recipe_asked(given["recipe"], given), given)
    if given["calib_size"] is not None:
        recipe = recipe.set("calibrate_activations.samples", given["calib_size"])
    with doing(f"reading {path}"):
        captured = load_program(path)
    guidance = recipe.sampler.guidance_scale if asked("guidance_scale") else None
    task = api.task_of(captured, folder=pipeline_folder(path), guidance_scale=guidance, **conditions)
    check_sampler(task, {"guidance_scale": recipe.sampler.guidance_scale, "eta": recipe.sampler.eta})
    refuse_nested(folder, path)
    return Measured(captured, task, recipe, widths, folder)


@click.command(cls=Command)
@program_argument
@click.option(
    "--budget",
    required=True,
    metavar="AMOUNT",
    help="What the plan may take: 200MB, 1.5MiB, 3.2GBOPs (bit operations), 80% of the largest plan's bytes, or w4a8: "
    "the bytes of these bits everywhere.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The plan, for --plan."
)
@click.option("--recipe", default="rtn", show_default=True, metavar="NAME|FILE.yaml", help="What calibrates.")
@click.option(
    "--count",
    type=click.Choice(["files", "bits"]),
    default="files",
    show_default=True,
    help="What a budget of bytes counts: tensors as an export for ONNX Runtime holds them, where a code takes half a "
    "byte or one, or codes at their bits, which no file has. The graph takes some more.",
)
@sensitivity_options
@measuring_options
@kept_option
@force_option
@json_option
def search(program: Path, output: Path, force: bool, as_json: bool, **given: Any) -> None:
    """Choose bits for every layer of PROGRAM within a budget, so that the output errs least; write a plan file.

    Each layer alone is quantised at every candidate, and the error of the denoiser's output measured; the choice is
    exact for the sum of their squares. Prints the plan's error as predicted and as measured, and that of equal bits;
    where these err less, they are the plan.
    """
    from hqc import console as out
    from hqc.atomic import write_file
    from hqc.errors import OptionError
    from hqc.recipes.plan_file import plan_yaml
    from hqc.search import Asked, parse_budget
    from hqc.search import search as run

    budget = parse_budget(given["budget"])
    if budget.unit != "bytes" and asked("count"):
        said = f"is of bytes, and --budget {budget.text} is of bit operations"
        raise OptionError(f"--count {given['count']}", said, "Leave it out.")
    check_output_file(output, force=force)
    subject = measured_on(program, output, given)
    recipe, task, folder = subject.recipe, subject.task, subject.folder
    claim(folder, stays=True)
    numbers = {name: given[name] for name in ("samples", "timesteps", "seed")}
    wanted = Asked(budget, subject.candidates, given["keep_float"], count=given["count"], **numbers)
    with resumable(folder):
        found = run(subject.program, recipe, task, wanted, folder=folder, phase=out.progress)
    lines = _lines(found)
    about = [f"hqc search, recipe {recipe.name}", *(f"{name}: {text}" for name, text in lines.items())]
    write_file(output, plan_yaml(found.plan, about).encode())
    if as_json:
        out.print_json({"plan": str(output), "recipe": recipe.name, "measured_on": task.drawn_from, **found.to_dict()})
        return
    out.fields(f"searched {program}", {**lines, "measured on": task.drawn_from, "plan": output})


def _lines(found: "Found") -> dict[str, str]:
    """What was found, for people and as comments of the plan."""
    from hqc.search.budget import shown

    mixed, uniform = found.found, found.uniform
    errors = {
        name: f"{shown(one.cost, found.unit)}, error {100 * one.predicted:.3g} % predicted, {100 * one.measured:.3g} % "
        "measured"
        for name, one in (("found", mixed), (f"{uniform.bits} everywhere", uniform))
    }
    fixed = f", {len(found.fixed)} fixed by the recipe's rules" if found.fixed else ""
    widths = ", ".join(f"{count} × {bits}" for bits, count in found.widths.items())
    lines = {"budget": shown(found.budget, found.unit), **errors, "sites": f"{widths}{fixed}"}
    if found.written is uniform:
        lines["but"] = (
            f"{uniform.bits} everywhere errs less and is what the plan says: errors of single layers do not add up here"
        )
    return lines
