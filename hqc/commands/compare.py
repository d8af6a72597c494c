"""The command that finds where two models part: compare."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command, check_sampler
from hqc.commands.options import check_output_file, force_option, json_option, sampler_options
from hqc.stages import doing

if TYPE_CHECKING:
    from torch import Tensor

    from hqc.evaluation.layer_errors import Comparison, ErrorNumbers, LayerError
    from hqc.program import Program

__all__ = ["compare"]

_NUMBERS = ("relative", "cosine", "max_abs", "sqnr_db")


@click.command(cls=Command)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--batch-size", type=click.IntRange(1, 256), default=2, show_default=True, help="Samples at a timestep.")
@click.option("--timesteps", type=click.IntRange(1, 1000), default=4, show_default=True, help="How many, spread.")
@click.option(
    "--inputs",
    "kind",
    type=click.Choice(["trajectory", "noise"]),
    default="trajectory",
    show_default=True,
    help="Inputs from a sampler's run of A, or normal noise.",
)
@sampler_options
@click.option("--seed", type=click.IntRange(0, 2**31), default=2024, show_default=True)
@click.option("--by", type=click.Choice(["arrives", "made"]), default="arrives", show_default=True, help="What ranks.")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Sites to print; files have all.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path, dir_okay=False), help="Also one row a site.")
@force_option
@json_option
def compare(
    a: Path, b: Path, by: str, top: int, csv_file: Path | None, force: bool, as_json: bool, **given: Any
) -> None:
    """Error at every site of B (a Program or an export) against A (a Program), worst first.

    "arrives": both run freely. "made": the site alone on equal inputs, so that what it adds is seen.
    """
    from hqc import console as out
    from hqc.evaluation.analysis_report import write_text
    from hqc.evaluation.export_errors import compare_export
    from hqc.evaluation.layer_errors import compare_programs
    from hqc.storage import load_program

    if csv_file is not None:
        check_output_file(csv_file, force=force)
    exported = _is_export(a, b)
    with doing(f"reading {a}"):
        first = load_program(a)
        second = None if exported else load_program(b)
    _require_memory(first, given["batch_size"] * given["timesteps"])
    args = _inputs(first, a, given)
    with doing(f"comparing {b} with {a}"):
        found = compare_export(first, b, args) if second is None else compare_programs(first, second, args)
    ranked = found.worst_first(made=by == "made")
    if csv_file is not None:
        write_text(csv_file, _csv(ranked))
    if as_json:
        about = {key: value for key, value in given.items() if key != "kind"}
        out.print_json(_data(a, b, {"inputs": given["kind"], "by": by, **about}, found, ranked))
        return
    out.console.print(f"{b.name} against {a.name}, worst site first", style="bold", markup=False, highlight=False)
    out.console.print(_table(ranked[:top]), markup=False, highlight=False)
    out.console.print(_summary(found, ranked, top, len(args[0]), given["kind"]), markup=False, highlight=False)
    if csv_file is not None:
        click.echo(f"wrote {csv_file}")


def _is_export(a: Path, b: Path) -> bool:
    """Whether B is an export; A must be a Program."""
    from hqc.errors import ComparisonError
    from hqc.runtimes.model import artefact_kind

    if artefact_kind(a) == "hqc-export":
        raise ComparisonError(str(a), "is an export; expected a Program", "Give the Program first, the export second.")
    return artefact_kind(b) == "hqc-export"


def _require_memory(program: "Program", rows: int) -> None:
    """Both models run on all samples at once, in step."""
    from hqc.memory import activation_bytes, require_memory

    require_memory(
        f"comparing on {rows} samples",
        2 * (program.size_bytes() + activation_bytes(program.graph, rows)),
        "Take a smaller --batch-size or fewer --timesteps, close other programs, or take a larger machine",
    )


def _inputs(program: "Program", folder: Path, given: dict[str, Any]) -> "tuple[Tensor, ...]":
    """One batch: a few samples at each of a few timesteps."""
    from hqc import api
    from hqc.errors import ComparisonError, TrainingError
    from hqc.evaluation.inputs import Sampler, noise_inputs, trajectory_inputs
    from hqc.storage import pipeline_folder

    steps, guidance, eta = (given[key] for key in ("num_inference_steps", "guidance_scale", "eta"))
    sampler = Sampler(given["batch_size"], given["batch_size"], steps, guidance, eta, given["seed"])
    if given["kind"] == "noise":
        return noise_inputs(program, given["batch_size"], given["timesteps"], given["seed"])
    try:
        task = api.task_of(program, folder=pipeline_folder(folder))
    except TrainingError as error:
        raise ComparisonError(error.where, error.found, "Give --inputs noise.") from error
    check_sampler(task, given)
    return trajectory_inputs(program, task, sampler, given["timesteps"])


# ---- what is printed -----------------------------------------------------------------------------------------------


def _cells(numbers: "ErrorNumbers | None") -> list[str]:
    if numbers is None:
        return ["–"] * 4
    sqnr = "∞" if numbers.relative == 0 else "–" if numbers.sqnr_db is None else f"{numbers.sqnr_db:.1f}"
    relative = "–" if numbers.relative is None else f"{numbers.relative:.2e}"
    return [relative, "–" if numbers.cosine is None else f"{numbers.cosine:.6f}", f"{numbers.max_abs:.2e}", sqnr]


_HEADS = ("arrives:", "", "", "", "made:", "")
_COLUMNS = ("relative", "cosine", "max abs", "SQNR, dB", "relative", "SQNR, dB")


def _table(ranked: "Sequence[LayerError]") -> str:
    """Numbers first, so that a long name never breaks a column."""
    rows: list[tuple[str, ...]] = [(*_HEADS, ""), (*_COLUMNS, "site")]
    for error in ranked:
        made, note = _cells(error.made), f" ({error.note})" if error.note else ""
        rows.append((*_cells(error.arrives), made[0], made[3], _printable(error.site) + note))
    return "\n".join("  ".join([*(f"{cell:<8}" for cell in row[:-1]), row[-1]]).rstrip() for row in rows)


def _printable(text: str) -> str:
    """Without characters that steer a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _summary(found: "Comparison", ranked: "Sequence[LayerError]", top: int, samples: int, kind: str) -> str:
    relative, cosine, largest, sqnr = _cells(found.output)
    numbers = f"relative {relative}, cosine {cosine}, max abs {largest}, SQNR {sqnr} dB"
    lines = [f"output: {numbers}; {samples} {kind} inputs"]
    if len(ranked) > top:
        lines.append(f"{len(ranked) - top} more sites: see --top, --csv or --json")
    missing = [error for error in found.sites if error.arrives is None]
    if missing:
        lines.append(f"{len(missing)} of {len(found.sites)} sites could not be compared: see the notes")
    if found.note:
        lines.append(found.note)
    for name, sites in (("A", found.only_a), ("B", found.only_b)):
        if sites:
            shown = ", ".join(map(_printable, sites[:5]))
            lines.append(f"{len(sites)} sites only in {name}: {shown}{' …' if len(sites) > 5 else ''}")
    return "\n".join(lines)


def _data(
    a: Path, b: Path, about: dict[str, Any], found: "Comparison", ranked: "Sequence[LayerError]"
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "a": str(a),
        "b": str(b),
        **about,
        "output": asdict(found.output),
        "sites": [asdict(error) for error in ranked],
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
        "note": found.note,
    }


def _csv(ranked: "Sequence[LayerError]") -> str:
    from hqc.evaluation.analysis_report import plain_cell

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["site", *_NUMBERS, *(f"made_{name}" for name in _NUMBERS), "note"])
    for error in ranked:
        pairs = [(numbers, name) for numbers in (error.arrives, error.made) for name in _NUMBERS]
        values = [getattr(numbers, name) if numbers is not None else None for numbers, name in pairs]
        shown = ["" if value is None else f"{value:.7g}" for value in values]
        writer.writerow([plain_cell(error.site), *shown, error.note])
    return file.getvalue()
