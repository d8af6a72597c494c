"""LoRAs of styles on the command line: `--lora`, `--lora-scale`, and the command that attaches some to a program."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command
from hqc.commands.options import Decorator, check_output, force_option, output_option
from hqc.stages import doing

if TYPE_CHECKING:
    from hqc.program import Program

__all__ = [
    "attach_lora",
    "lora_option",
    "lora_scale_option",
    "said_of",
    "set_scales",
    "with_export_loras",
    "with_loras",
]

_METAVAR = "[NAME=]FILE[:SCALE]"


def lora_option(help_text: str) -> Decorator:
    """`--lora`, which may repeat."""
    return click.option("--lora", "loras", multiple=True, metavar=_METAVAR, help=f"{help_text}; may repeat.")


lora_scale_option = click.option(
    "--lora-scale",
    "lora_scales",
    multiple=True,
    metavar="NAME=SCALE",
    help="Of a LoRA that is attached to MODEL, 0 for none of it (default: as it was attached with); may repeat.",
)


def with_loras(program: "Program", loras: tuple[str, ...], *, merged: bool = False, say: bool = True) -> "Program":
    """The program with LoRAs from files; what of them it does not take is said on standard error.

    Raises:
        HqcError: see `hqc.merge_loras` and `hqc.attach_loras`.
    """
    from hqc.api import attach_loras, merge_loras
    from hqc.wording import listed

    if not loras:
        return program
    with doing("reading LoRAs"):
        result = (merge_loras if merged else attach_loras)(program, loras)
    for record in result.history[len(program.history) :] if say else ():
        for reason in dict.fromkeys(reason for _, reason in record.missed):
            what = listed([site for site, own in record.missed if own == reason])
            click.echo(f"left out of the LoRA: {what}: {reason}", err=True)
    return result


def with_export_loras(program: "Program", loras: tuple[str, ...], *, merged: bool) -> "Program":
    """The program with LoRAs as the options of an export say.

    Raises:
        OptionError: for a merge into a program that is quantised. HqcError: see `with_loras`.
    """
    from hqc.errors import OptionError
    from hqc.program import Stage

    if merged and program.stage != Stage.CAPTURED:
        found = f"is possible before quantisation alone, and the program is {program.stage}"
        raise OptionError("--merge-lora", found, "Leave it out, or merge at `hqc trace --lora` and quantise that.")
    return with_loras(program, loras, merged=merged)


def said_of(program: "Program") -> dict[str, str]:
    """A program's LoRAs for a summary; nothing without any."""
    return {"loras": ", ".join(map(str, program.styles))} if program.styles else {}


def set_scales(pipe: Any, scales: tuple[str, ...]) -> None:
    """Gives a pipeline's denoiser the scales of its LoRAs.

    Raises:
        OptionError: for a text that is no scale. EvaluationError: for a LoRA that it does not have.
    """
    from hqc.evaluation.needs import denoiser_of
    from hqc.styles.request import parse_scales

    if scales:
        denoiser_of(pipe).set_lora_scales(parse_scales(scales))


@click.command("attach-lora", cls=Command)
@click.argument("program", type=click.Path(path_type=Path))
@output_option
@lora_option("Its scale is an input lora_scale_NAME of the result, SCALE where a caller gives none")
@force_option
def attach_lora(program: Path, output: Path, loras: tuple[str, ...], force: bool) -> None:
    """Put LoRAs from safetensors files beside the layers of PROGRAM, captured or quantised, as float branches.

    Their scales are inputs: `hqc sample --lora-scale NAME=0.8` and every call choose them. To merge a LoRA into the
    weights instead, give it to `hqc trace --lora`, before anything is quantised.
    """
    from hqc.errors import OptionError
    from hqc.storage import load_program, pipeline_folder, save_program

    if not loras:
        raise OptionError("--lora", "is missing; expected a LoRA to attach", "Give --lora FILE.safetensors.")
    check_output(output, program, force=force)
    with doing(f"reading {program}"):
        loaded = load_program(program)
    result = with_loras(loaded, loras)
    with doing(f"writing {output}"):
        save_program(result, output, force=force, pipeline=pipeline_folder(program))
    for style in result.styles[len(loaded.styles) :]:
        click.echo(f"attached {style}")
    click.echo(f"wrote {output}")
