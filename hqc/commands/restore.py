"""The command that restores images in one step: restore."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hqc.commands.applies import Command
from hqc.commands.options import check_output, force_option, json_option, runtime_option
from hqc.stages import doing

if TYPE_CHECKING:
    from hqc.runtimes import Runtime

__all__ = ["restore"]

_part = click.Path(path_type=Path)


@click.command(cls=Command)
@click.argument("encoder", type=_part)
@click.argument("denoiser", type=_part)
@click.argument("decoder", type=_part)
@click.option("--images", type=_part, required=True, metavar="FOLDER", help="PNG, JPEG, WebP or BMP files.")
@click.option("-o", "--output", type=_part, default=Path("restored"), show_default=True, help="A folder of PNG files.")
@click.option(
    "--timestep",
    type=click.FloatRange(0, 1_000_000),
    default=999.0,
    show_default=True,
    help="Of the denoiser's one call.",
)
@click.option("--prompt", metavar="TEXT", help="For a text-conditional denoiser (default: the empty prompt).")
@click.option("--label", type=click.IntRange(0), metavar="CLASS", help="For a class-conditional denoiser.")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=1, show_default=True, help="Images at once.")
@runtime_option
@force_option
@json_option
def restore(
    encoder: Path,
    denoiser: Path,
    decoder: Path,
    images: Path,
    output: Path,
    timestep: float,
    prompt: str | None,
    label: int | None,
    batch_size: int,
    runtime: "Runtime | None",
    force: bool,
    as_json: bool,
) -> None:
    """Restore the images of a folder in one step: ENCODER, DENOISER and DECODER, Programs or exports, as one pipeline.

    Each image is scaled to cover the size that ENCODER was captured for, and cut around its middle; its restored one
    has the same name. The scheduler and what encodes the prompt are those of DENOISER's pipeline.
    """
    from hqc import console as out
    from hqc.restoration import Restorer
    from hqc.restoring import conditions_asked, restore_folder
    from hqc.runtimes import load

    check_output(output, images, force=force)
    parts = [load(one, runtime=runtime) for one in (encoder, denoiser, decoder)]
    restorer = Restorer(parts[0], parts[1], parts[2], timestep)
    conditions = conditions_asked(restorer, prompt=prompt, label=label)
    with doing("restoring images") as stage:
        count = restore_folder(restorer, images, output, conditions, batch_size=batch_size, force=force, progress=stage)
    runs = {"runtime": ", ".join(dict.fromkeys(part.runtime for part in parts)), "timestep": timestep}
    if as_json:
        out.print_json({"restored": str(output), "images": count, **runs})
        return
    click.echo(f"wrote {output}: {count} image{'' if count == 1 else 's'}")
