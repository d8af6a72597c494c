"""The command that looks into a Program: analyze."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, asked, check_sampler, option_name
from hqc.commands.options import (
    bits_option,
    calib_size_option,
    check_output_file,
    condition_options,
    conditions_asked,
    force_option,
    json_option,
    keep_float_option,
    options,
    program_argument,
    rules_option,
    sampler_options,
)
from hqc.errors import OptionError

if TYPE_CHECKING:
    from hqc.recipes import Recipe

__all__ = ["analyze"]

_FILE = click.Path(path_type=Path, dir_okay=False)
_plan_options = options(
    click.option("--recipe", default="hq-dm", show_default=True, help="Whose plan, for a captured PROGRAM."),
    bits_option,
    click.option(
        "--block",
        type=click.Choice(["0", "8", "16", "32", "64", "128"]),
        help="Hadamard order; 0 for a plan without rotation (default: the recipe's).",
    ),
    rules_option,
    keep_float_option,
)


@click.command(cls=Command)
@program_argument
@click.option("-o", "--output", type=_FILE, default=Path("report.html"), show_default=True, help="The report.")
@click.option("--csv", "csv_file", type=_FILE, help="Also one row a site and timestep.")
@_plan_options
@calib_size_option
@condition_options
@click.option("--batch-size", type=click.IntRange(1, 1024), default=8, show_default=True, help="Images run together.")
@sampler_options
@click.option("--seed", type=click.IntRange(0, 2**31), default=2024, show_default=True, help="Of the trajectories.")
@click.option(
    "--sensitivity/--no-sensitivity",
    default=None,
    help="Quantise each site alone (default: if it takes less than ten minutes).",
)
@click.option("--sensitivity-samples", type=click.IntRange(1, 64), default=2, show_default=True, help="At a timestep.")
@force_option
@json_option
def analyze(program: Path, output: Path, csv_file: Path | None, **given: Any) -> None:
    """Measure PROGRAM per site and timestep: outliers, SNR before and after rotation, sensitivity; an HTML report.

    A captured PROGRAM is measured with the plan that a recipe would make; a quantised one with its own.
    """
    from hqc import __version__, api
    from hqc import console as out
    from hqc.evaluation.analysis_report import csv_text, report_data, summary, write_text
    from hqc.evaluation.analysis_run import measure, planned_program
    from hqc.evaluation.drawing import require_drawing
    from hqc.evaluation.html_report import html_report
    from hqc.evaluation.inputs import Sampler
    from hqc.program import Stage
    from hqc.storage import load_program, pipeline_folder

    require_drawing("plotly", "hqc analyze")
    outputs = [file for file in (output, csv_file) if file is not None]
    for file in outputs:
        check_output_file(file, force=given["force"])
    conditions = conditions_asked(given)
    loaded = load_program(program)
    if loaded.stage != Stage.CAPTURED:
        _refuse_plan(given["block"])
    block = None if given["block"] is None else int(given["block"])
    recipe = _recipe(given["recipe"], given["rules"], block)
    guidance = given["guidance_scale"] if asked("guidance_scale") else None
    task = api.task_of(loaded, folder=pipeline_folder(program), guidance_scale=guidance, **conditions)
    check_sampler(task, given)
    sampler = Sampler(
        given["calib_size"],
        given["batch_size"],
        given["num_inference_steps"],
        given["guidance_scale"],
        given["eta"],
        given["seed"],
    )
    planned = planned_program(
        loaded, recipe, given["bits"], task.timesteps(sampler.num_inference_steps), given["keep_float"]
    )
    measured = {
        "program": program.name,
        "stage": str(loaded.stage),
        "source": loaded.origin.source,
        "bits": planned.plan.bits,
        "plan": planned.plan.recipe
        if loaded.stage != Stage.CAPTURED
        else f"{recipe.name}, rules {recipe.step('select_layers').rules}",
        "calibrated_on": task.drawn_from,
        "sampler": type(task.new_scheduler()).__name__,
        "steps": sampler.num_inference_steps,
        "guidance": sampler.guidance_scale,
        "eta": sampler.eta,
        "images": sampler.images,
        "batch_size": sampler.batch_size,
        "seed": sampler.seed,
        "hqc": __version__,
    }
    report = measure(
        loaded,
        planned,
        task,
        sampler,
        measured,
        samples=given["sensitivity_samples"],
        sensitivity=given["sensitivity"],
        block=block or 32,
        phase=out.progress,
        say=lambda line: out.stderr.print(line, highlight=False) if out.stderr.is_terminal else None,
    )
    write_text(output, html_report(report))
    if csv_file is not None:
        write_text(csv_file, csv_text(report))
    if given["as_json"]:
        out.print_json(report_data(report))
        return
    out.fields(f"analysed {program}", _lines(summary(report), report.sensitivity_note))
    for file in outputs:
        click.echo(f"wrote {file}")


def _recipe(name: str, rules: str | None, block: int | None) -> "Recipe":
    """The recipe whose plan is measured; block 0 leaves its rotation out."""
    from hqc.recipes import find_recipe
    from hqc.recipes.rotation import rotation

    found = find_recipe(name)
    if rules is not None:
        found = found.set("select_layers.rules", rules)
    if block == 0:
        return found.unrotated()
    return found if block is None else found.rotated(rotation("sylvester", block))


def _refuse_plan(block: str | None) -> None:
    """A quantised program has a plan of its own: options that would make another one are refused.

    An order is tried at the sites that it does not rotate; 0 tries none.
    """
    names = [name for name in ("recipe", "bits", "rules", "keep_float") if asked(name)]
    if options := [*map(option_name, names), *(["--block 0"] if block == "0" else [])]:
        raise OptionError(options[0], "PROGRAM is quantised and has a plan of its own", "Give the captured Program.")


def _lines(data: dict[str, Any], note: str) -> dict[str, str]:
    """The summary for people."""
    lines = {"sites": f"{data['sites']}, {data['quantised']} quantised, {data['rotated']} rotated"}
    names = {"max_over_rms": "max/RMS", "kurtosis": "kurtosis", "snr_db": "SNR, dB"}
    for key, name in names.items():
        before, after = data[key]["before"], data[key]["after"]
        if before is not None and after is not None:
            lines[f"{name}, before → after rotation"] = f"{before:.3g} → {after:.3g}"
    if data["snr_gain_db"] is not None:
        gain = data["snr_gain_db"]
        lines["SNR gain by rotation, dB"] = (
            f"median {gain['median']:+.3g}, most {gain['most']:+.3g} ({gain['most_site']})"
        )
    if data["weight_snr_db"] is not None:
        lines["weight SNR, dB"] = f"{data['weight_snr_db']:.3g}"
    if data["all_sites_error"] is not None:
        lines["output error, all sites"] = f"{100 * data['all_sites_error']:.3g} %"
    for rank, found in enumerate(data["most_sensitive"], 1):
        lines[f"most sensitive, {rank}"] = f"{100 * found['error']:.3g} %  {found['site']}"
    if not data["most_sensitive"]:
        lines["sensitivity"] = note
    return lines
