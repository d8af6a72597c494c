"""Commands that show a Program and what a recipe or a target makes of it: explain, inspect."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import OF_A_RECIPE, Command, asked, option_name
from hqc.commands.exportable import print_survey
from hqc.commands.loras import said_of
from hqc.commands.options import (
    bits_option,
    json_option,
    keep_float_option,
    plan_option,
)
from hqc.commands.recipe_options import plan_and_bits, recipe_asked, recipe_options
from hqc.wording import printable

if TYPE_CHECKING:
    from hqc.export.surveys import Survey
    from hqc.program import Program

__all__ = ["explain", "inspect"]


@click.command(cls=Command)
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--recipe", default="hq-dm", show_default=True)
@bits_option
@recipe_options
@plan_option
@keep_float_option
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the plan as YAML for --plan.")
@click.option(
    "--target",
    type=click.Choice(["portable", "onnxruntime", "tensorrt", "torch-int8", "torch-cuda"]),
    help="Show instead what this export target or runtime takes of PROGRAM, and what it does not: exit status 1 then.",
)
@json_option
def explain(
    program: Path,
    recipe: str,
    keep_float: tuple[str, ...],
    as_yaml: bool,
    target: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Show what a recipe would do to PROGRAM: every site with its bits, rotation, and the reason of every miss.

    A PROGRAM that is quantised already shows its own plan, with the error of every rotation that was tried.
    """
    from hqc import console as out
    from hqc.calibration.rotations import free_sites
    from hqc.plan import RULE_SETS
    from hqc.program import Stage
    from hqc.recipes.run import Request, is_procedure, planned
    from hqc.steps import step_text
    from hqc.storage import load_program

    if target is not None:
        print_survey(program, _survey(load_program(program), target), as_json=as_json)
        return
    captured = load_program(program)
    if captured.stage != Stage.CAPTURED:
        _show_own_plan(program, captured, as_yaml=as_yaml, as_json=as_json)
        return
    plan, bits = plan_and_bits(given)
    found = recipe_asked(recipe, given).following(plan.rules)
    result = planned(captured, found, Request(bits, keep_float, rules=plan.rules), calibrated=False)
    unseen = [step_text(s) for s in found.steps if is_procedure(s) and s.samples_denoiser]
    unseen = [text for text in unseen if text not in [record.text for record in result.history]]
    if as_yaml:
        undecided = [site.site for site in free_sites(result)] if found.step("choose_rotation") is not None else []
        _print_plan(result, f"{program} by the recipe {found.name}", undecided)
        return
    if as_json:
        ran = [
            {"pass": str(r.text), "missed": dict(r.missed), "removed": list(r.removed)}
            for r in result.history[len(captured.history) :]
        ]
        out.print_json(
            {
                "plan": result.plan.to_dict(),
                "pipeline": found.text,
                "passes": ran,
                "weights": _weights(result),
                **said_of(result),
            }
        )
        return
    out.console.print(out.sites_table(result))
    _print_beside(result)
    _print_weights(result)
    rules = found.step("select_layers").rules
    ordered = [f"  {rule}" for rule in (*RULE_SETS[rules], *plan.rules)]
    out.console.print("rules, last match wins:", *ordered, sep="\n", markup=False)
    out.console.print(f"pipeline: {found.text}", markup=False)
    if unseen:
        out.console.print(f"not run, since they need samples: {', '.join(unseen)}", markup=False, highlight=False)
    for record in result.history[len(captured.history) :]:
        out.console.print(str(record), markup=False, highlight=False)


def _survey(program: "Program", target: str) -> "Survey":
    """What an export target or a runtime of integer products takes."""
    from hqc.export.surveys import survey
    from hqc.runtimes.integer.survey import INTEGER_RUNTIMES, survey_runtime

    return survey_runtime(program, target) if target in INTEGER_RUNTIMES else survey(program, target)  # type: ignore[arg-type]


def _print_plan(program: "Program", of: str, undecided: Sequence[str] = ()) -> None:
    """The plan of a program as a file of rules. undecided: sites whose rotation is chosen when the recipe runs."""
    from hqc.recipes.plan_file import plan_of, plan_yaml

    left = [f"the recipe chooses the rotation of {len(undecided)} sites when it runs"] if undecided else []
    click.echo(plan_yaml(plan_of(program.plan, undecided), [f"The plan of {printable(of)}", *left]), nl=False)


def _show_own_plan(path: Path, program: "Program", *, as_yaml: bool, as_json: bool) -> None:
    """The plan of a program that is quantised: with the rotations that were chosen, and why.

    Raises:
        OptionError: for options of a recipe, which is not asked any more.
    """
    from hqc import console as out
    from hqc.errors import OptionError

    if typed := [name for name in OF_A_RECIPE if asked(name)]:
        raise OptionError(option_name(typed[0]), f"{path} is quantised and has its own plan", "Leave it out.")
    if as_yaml:
        _print_plan(program, str(path))
        return
    if as_json:
        out.print_json({"plan": program.plan.to_dict(), "weights": _weights(program), **said_of(program)})
        return
    out.console.print(out.sites_table(program))
    _print_beside(program)
    _print_weights(program)


def _print_beside(program: "Program") -> None:
    """How attention is quantised, where it is, and the LoRAs of the program."""
    from hqc import console as out
    from hqc.attentions import part_name

    for plan in program.plan.attentions:
        kinds = program.state.get(f"{part_name(plan.name, 'softmax')}.log2_table")
        powers = 0 if kinds is None else int((kinds > 0.5).sum())
        more = f", in powers of two at {powers} of {len(kinds)} timesteps" if powers and kinds is not None else ""
        out.console.print(f"attention {plan.name}: {plan}{more}", markup=False, highlight=False)
    for style in program.styles:
        out.console.print(f"LoRA {style}", markup=False, highlight=False)


def _weights(program: "Program") -> dict[str, int]:
    """Bytes of the quantised weights by their bits, and as an integer program keeps them."""
    from hqc.evaluation.comparison.size import weight_bytes

    return dict(zip(("bytes_by_bits", "bytes_stored"), map(round, weight_bytes(program)), strict=True))


def _print_weights(program: "Program") -> None:
    from hqc import console as out
    from hqc.memory import bytes_text

    by_bits, stored = map(bytes_text, _weights(program).values())
    out.console.print(
        f"weights: {by_bits} by their bits, {stored} as int8 and packed int4", markup=False, highlight=False
    )


@click.command(cls=Command)
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--graph/--no-graph", default=True, show_default=True, help="Print the graph's text.")
@json_option
def inspect(program: Path, graph: bool, as_json: bool) -> None:
    """Show PROGRAM: graph text, plan, history, sizes."""
    from hqc import console as out
    from hqc.storage import load_program
    from hqc.text import graph_text

    loaded = load_program(program)
    sizes: dict[str, int] = {}
    for name, tensor in loaded.state.items():
        kind = name.rsplit(".", 1)[-1]
        sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()
    summary = {
        "stage": str(loaded.stage),
        "source": loaded.origin.source,
        "nodes": len(loaded.graph.nodes),
        "sites": len(list(loaded.sites())),
        "weights_bytes": loaded.size_bytes(),
        "bytes_by_kind": sizes,
        **said_of(loaded),
    }
    if as_json:
        text = {"graph": graph_text(loaded).splitlines()} if graph else {}
        out.print_json({**summary, "plan": loaded.plan.to_dict(), "history": [str(r) for r in loaded.history], **text})
        return
    if graph:
        click.echo(graph_text(loaded))
    if loaded.plan.sites:
        out.console.print(out.sites_table(loaded))
    for record in loaded.history:
        out.console.print(str(record), markup=False, highlight=False)
    out.fields(str(program), summary)
