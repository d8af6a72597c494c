"""The command that measures tiles on this machine's GPU: tune."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hqc.commands.applies import Command
from hqc.commands.bench import _BatchSizes
from hqc.commands.options import claim, json_option, program_argument

if TYPE_CHECKING:
    from hqc.kernels.measuring import TuningReport
    from hqc.runtimes.integer.cuda.session import Precision, Weights

__all__ = ["tune"]


@click.command(cls=Command)
@program_argument
@click.option(
    "--batch-size",
    "batch_sizes",
    type=_BatchSizes(),
    default="1,2,8,32",
    show_default=True,
    help="Those that the model will run at: one, or several.",
)
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16", show_default=True)
@click.option(
    "--weights",
    type=click.Choice(["int8", "int4"]),
    default="int8",
    show_default=True,
    help="As the sessions will have them; int4: kept packed.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Default: the card's file in the cache folder, which sessions look for.",
)
@click.option(
    "--limit-seconds",
    type=click.FloatRange(1),
    metavar="N",
    help="Begin no product after so long; those that take the most time come first.",
)
@json_option
def tune(
    program: Path,
    batch_sizes: tuple[int, ...],
    dtype: "Precision",
    weights: "Weights",
    output: Path | None,
    limit_seconds: float | None,
    as_json: bool,
) -> None:
    """Measure the tiles of PROGRAM's integer products on this machine's NVIDIA GPU, and keep the quickest.

    The torch-cuda runtime takes them from then on. Shapes that the file has already are not measured again: a run that
    was interrupted goes on. Every tile gives the same bits; one that does not is refused and named.
    """
    from hqc import console as out
    from hqc.kernels.tuned import refuse_foreign_table
    from hqc.runtimes.integer.cuda.session import require_gpu
    from hqc.runtimes.integer.cuda.tune import tune_program
    from hqc.storage import load_program

    require_gpu()
    if output is not None:
        refuse_foreign_table(output)
        claim(output, force=True)
    loaded = load_program(program)
    with out.late_progress("products") as advance:
        report = tune_program(
            loaded,
            batch_sizes,
            dtype=dtype,
            weights=weights,
            output=output,
            limit_seconds=limit_seconds,
            on_product=advance,
        )
    if as_json:
        out.print_json(report.to_dict())
        return
    for problem in report.problems:
        out.stderr.print(problem, markup=False, highlight=False)
    out.fields(str(report.path), _summary(report))


def _summary(report: "TuningReport") -> dict[str, str]:
    lines = {"measured": f"{len(report.measured)} products"}
    if report.kept:
        lines["there already"] = f"{report.kept} products"
    if report.left:
        lines["left"] = f"{report.left} products; run it again to go on"
    if report.measured:
        ratio = report.us_before / report.us_after
        lines["time of a call"] = f"{report.us_before:.0f} → {report.us_after:.0f} µs in these products, {ratio:.2f}×"
    return lines
