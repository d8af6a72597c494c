"""The command that chooses bits and LoRA ranks together: qr-adaptor."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, asked
from hqc.commands.options import (
    check_output_file,
    claim,
    force_option,
    json_option,
    output_option,
    program_argument,
    resumable,
)
from hqc.commands.search import kept_option, measured_on, measuring_options, sensitivity_options

if TYPE_CHECKING:
    from hqc.search.joint import Adapted

__all__ = ["qr_adaptor"]


@click.command(name="qr-adaptor", cls=Command)
@program_argument
@click.option(
    "--budget",
    required=True,
    metavar="AMOUNT",
    help="Bytes, codes at their bits and LoRAs at 16: 200MB, 1.5MiB, 80% of the largest plan's, or w4a8: these bits "
    "everywhere.",
)
@output_option
@click.option("--recipe", default="hq-dm", show_default=True, metavar="NAME|FILE.yaml", help="That trains LoRAs.")
@sensitivity_options
@click.option("--ranks", default="8,16,32", show_default=True, metavar="RANKS", help="Of LoRAs, as far as layers go.")
@click.option("--trials", type=click.IntRange(1), default=480, show_default=True, help="Of NSGA-II; none is trained.")
@click.option("--population", type=click.IntRange(2), default=40, show_default=True, help="Of NSGA-II.")
@click.option("--trainings", type=click.IntRange(1), default=12, show_default=True, help="Plans trained, at most.")
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True, help="Trajectories of a training.")
@measuring_options
@click.option(
    "--chart", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Error over size, .png or .svg."
)
@kept_option
@force_option
@json_option
def qr_adaptor(program: Path, output: Path, chart: Path | None, force: bool, as_json: bool, **given: Any) -> None:
    """Choose bits and LoRA ranks of every layer of PROGRAM together (QR-Adaptor); write a plan file for `hqc qat`.

    Like `hqc search`, with short trainings: one tells what training is worth at every layer, the others are of plans
    that a search by NSGA-II and then a Gaussian process propose.
    """
    from hqc import console as out
    from hqc.atomic import write_file
    from hqc.recipes.plan_file import plan_yaml
    from hqc.search import parse_budget
    from hqc.search.joint import AskedJointly, adapt

    budget, ranks = parse_budget(given["budget"]), _ranks(given["ranks"])
    for path in (output, *([chart] if chart is not None else [])):
        check_output_file(path, force=force)
    _check_chart(chart)
    subject = measured_on(program, output, given)
    recipe = subject.recipe
    if recipe.step("distil") is not None and (asked("epochs") or not recipe.step("distil").updates):
        recipe = recipe.set("distil.epochs", given["epochs"])
    joint = AskedJointly(
        budget,
        subject.candidates,
        ranks,
        given["keep_float"],
        trials=given["trials"],
        population=given["population"],
        trainings=given["trainings"],
        **{name: given[name] for name in ("samples", "timesteps", "seed")},
    )
    claim(subject.folder, stays=True)
    with resumable(subject.folder):
        found = adapt(subject.program, recipe, subject.task, joint, folder=subject.folder, phase=out.progress)
    lines = _lines(found)
    about = [f"hqc qr-adaptor, recipe {recipe.name}", *(f"{name}: {text}" for name, text in lines.items())]
    write_file(output, plan_yaml(found.plan, about).encode())
    if chart is not None:
        from hqc.search.joint.plot import plot_bytes

        write_file(chart, plot_bytes(found, "svg" if chart.suffix.lower() == ".svg" else "png"))
    if as_json:
        out.print_json({"plan": str(output), "recipe": recipe.name, **found.to_dict()})
        return
    drawn = {} if chart is None else {"chart": chart}
    out.fields(f"adapted {program}", {**lines, "measured on": subject.task.drawn_from, "plan": output, **drawn})


def _check_chart(chart: Path | None) -> None:
    from hqc.evaluation.drawing import require_drawing, require_picture

    if chart is None:
        return
    require_picture(chart)
    require_drawing("matplotlib", "--chart")


def _ranks(text: str) -> tuple[int, ...]:
    """8,16,32 -> each once, ascending.

    Raises:
        PlanError: for what is no rank.
    """
    from hqc.errors import PlanError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 65_536 for part in parts):
        raise PlanError(f"--ranks {text}", "has what is no rank of at least 1", "Write them as in 8,16,32.")
    return tuple(sorted({int(part) for part in parts}))


def _lines(found: "Adapted") -> dict[str, str]:
    """What was found, for people and as comments of the plan."""
    from collections import Counter

    from hqc.search.budget import shown

    best = found.best
    kinds = Counter(f"{bits} r{rank}" for bits, rank in best.choices.values())
    errors = f"{100 * best.predicted:.3g} % predicted, {100 * best.measured:.3g} % measured after training"
    return {
        "budget": shown(found.budget, "bytes"),
        "found": f"{shown(best.cost, 'bytes')}, error {errors}",
        "trained": f"{len(found.trained)} plans",
        "sites": ", ".join(f"{count} × {kind}" for kind, count in sorted(kinds.items())),
    }
