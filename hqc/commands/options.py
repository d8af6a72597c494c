"""What several commands share: options, and checks before long work starts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.serving.schedulers import SCHEDULER_NAMES

if TYPE_CHECKING:
    from hqc.evaluation.workspace import Stage

__all__ = [
    "ROTATION_KINDS",
    "bits_option",
    "calib_size_option",
    "check_output",
    "check_output_file",
    "claim",
    "condition_options",
    "conditions_asked",
    "drawing_options",
    "force_option",
    "json_option",
    "keep_float_option",
    "latent_size_option",
    "options",
    "output_option",
    "plan_option",
    "program_argument",
    "resumable",
    "rules_option",
    "runtime_option",
    "sampler_options",
    "say_stage",
    "scheduler_option",
    "work_folder",
]


def check_output(output: Path, source: Path, *, force: bool, may_be_there: bool = False) -> None:
    """Claims the place of an artefact until the command ends, before long work starts.

    Refuses one that is there (unless it may be), one inside the folder that it is made from, and a place that cannot be
    written or that another command is writing.
    """
    from hqc.atomic import refuse_existing, refuse_nested

    refuse_nested(output, source)
    claim(output, force=force)
    if not may_be_there:
        refuse_existing(output, force=force)


def check_output_file(output: Path, *, force: bool) -> None:
    """The same of a file. Into a device or a pipe the file is written as it is."""
    from hqc.atomic import is_stream, refuse_existing_file

    if is_stream(output):
        return
    claim(output, force=force)
    refuse_existing_file(output, force=force)


def work_folder(asked: Path | None, output: Path, ending: str) -> Path:
    """Where the work for an output is kept: as asked, or beside it. A path without a name, as `.`, is refused later."""
    return asked or output.parent / f"{output.name or 'output'}{ending}"


def claim(output: Path, *, force: bool = False, stays: bool = False) -> None:
    """Keeps other commands from writing a path until this one ends; refuses a place that cannot be written.

    force, stays: see `hqc.claims.claimed`.
    """
    from hqc.claims import claimed

    click.get_current_context().with_resource(claimed(output, force=force, stays=stays))


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Says on Ctrl-C that what was done is kept in a folder."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"hqc: interrupted; the same command goes on from {folder}", err=True)
        raise


def conditions_asked(given: dict[str, Any]) -> dict[str, Any]:
    """Takes --synthetic and --prompts out of what was given, for `api.task_of`; the file is read before long work.

    Raises:
        TrainingError: if both are given, or the file holds no prompts.
    """
    from hqc.errors import TrainingError

    synthetic, file = given.pop("synthetic"), given.pop("prompts")
    if file is None:
        return {"synthetic": synthetic}
    if synthetic:
        raise TrainingError("--prompts", "and --synthetic exclude each other", "Give one of them.")
    from hqc.prompt_files import read_prompts

    return {"prompts": read_prompts(file)}


def say_stage(stage: "Stage") -> None:
    """A line on standard error for a stage of a work folder that has ended."""
    from hqc import console as out

    note = ", kept from an earlier run" if stage.reused else ""
    out.stderr.print(f"{stage.name}: {stage.seconds:.1f} s{note}", markup=False, highlight=False)


# ---- options that several commands share ---------------------------------------------------------------------------

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def options(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, in the order given."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """One side, or height and width."""

    name = "SIDE|HEIGHTxWIDTH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """64 or (64, 96)."""
        from hqc.sizes import as_size

        try:
            return as_size(value)
        except ValueError as error:
            return self.fail(str(error), param, ctx)


latent_size_option = click.option(
    "--latent-size", type=_Size(), help="Size of the latents, 64 or 64x96 (default: from SOURCE)."
)
output_option = click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where to write.")
force_option = click.option("--force", is_flag=True, help="Replace an artefact that is already there.")
program_argument = click.argument("program", type=click.Path(path_type=Path))
condition_options = options(
    click.option(
        "--prompts",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Conditions from the pipeline's own text encoder, one prompt a line.",
    ),
    click.option(
        "--synthetic", is_flag=True, help="Noise and random conditions instead: for any denoiser, without a pipeline."
    ),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
bits_option = click.option("--bits", default="w4a4", show_default=True, help="wNaM, N and M in 2…8, case-insensitive.")
plan_option = click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.yaml",
    help="Rules that give single sites bits, a rotation, a LoRA rank; `hqc explain --yaml` and `hqc search` write one.",
)
rules_option = click.option("--rules", help="Layer rules: default, reference, mixed or all (default: the recipe's).")
keep_float_option = click.option("--keep-float", multiple=True, metavar="PATTERN", help="Leave matching sites float.")


def _sampler_options(guidance: str | bool) -> Decorator:
    """Of a sampler; guidance: what help says of its default."""
    return options(
        click.option("--num-inference-steps", "--n-steps", type=click.IntRange(1, 1000), default=20, show_default=True),
        click.option(
            "--guidance-scale",
            type=click.FloatRange(0, 100),
            default=1.5,
            show_default=guidance,
            help="Classifier-free guidance; none up to 1.",
        ),
        click.option("--eta", type=click.FloatRange(0, 1), default=0.0, show_default=True),
    )


sampler_options = _sampler_options(True)
drawing_options = _sampler_options("1.5; of prompts the pipeline's own")
runtime_option = click.option(
    "--runtime",
    type=click.Choice(["torch", "torch-int8", "torch-cuda", "onnxruntime", "tensorrt"]),
    help="Default: what fits (Program: torch; export for TensorRT, on its GPU: tensorrt; else onnxruntime).",
)
scheduler_option = click.option(
    "--scheduler",
    type=click.Choice(SCHEDULER_NAMES),
    help="Instead of the pipeline's own (without torch: ddim, dpmsolver++ or euler).",
)
calib_size_option = click.option(
    "--calib-size", type=click.IntRange(1, 4096), default=16, show_default=True, help="Images."
)
ROTATION_KINDS = ("sylvester", "regular", "auto")
"""What --hadamard takes; alone it is the first."""
