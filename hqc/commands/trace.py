"""The command that captures: trace."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from hqc.commands.applies import Command
from hqc.commands.exportable import warn_unless_exportable
from hqc.commands.loras import lora_option, said_of, with_loras
from hqc.commands.options import (
    check_output,
    force_option,
    json_option,
    latent_size_option,
    output_option,
)
from hqc.stages import doing

if TYPE_CHECKING:
    from hqc.capture.sources import SourceOptions

__all__ = ["trace"]


@click.command(cls=Command)
@click.argument("source")
@output_option
@click.option(
    "--condition-length", type=click.IntRange(1, 4096), help="Tokens of the condition (default: from SOURCE)."
)
@latent_size_option
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The configuration of a checkpoint file, SOURCE: YAML of the original code, or diffusers' config.json.",
)
@click.option(
    "--weights",
    type=click.Choice(["raw", "ema"]),
    help="Of a file, folder or hub id that has both raw and averaged weights (default: ema).",
)
@click.option("--variant", help="Of the weights in a diffusers folder or hub id, for example fp16 or non_ema.")
@click.option("--revision", help="Branch, tag or commit of a hub id, SOURCE.")
@click.option(
    "--part",
    type=click.Choice(["denoiser", "vae-encoder", "vae-decoder"]),
    default="denoiser",
    show_default=True,
    help="Of a pipeline: its denoiser, or a half of its autoencoder (or of the autoencoder's own folder).",
)
@click.option("--outliers", is_flag=True, help="Heavy-tailed activations in a named architecture, arch:NAME.")
@lora_option("A LoRA to add to the weights, times SCALE (default: 1), a .safetensors file")
@force_option
@json_option
def trace(
    source: str,
    output: Path,
    loras: tuple[str, ...],
    force: bool,
    as_json: bool,
    **options: "Unpack[SourceOptions]",
) -> None:
    """Capture SOURCE into a Program.

    SOURCE is `digits`, a diffusers pipeline or denoiser folder, a hub id (owner/name), a checkpoint file (.ckpt or
    .safetensors, with --config), `arch:NAME` (a published size with seeded weights), or `module:callable`.
    """
    import time

    from hqc import console as out
    from hqc.capture import find_source
    from hqc.capture import trace as capture
    from hqc.capture.unreached import left_out
    from hqc.storage import save_program
    from hqc.styles.reading import check_file
    from hqc.styles.request import parse_loras

    check_output(output, Path(source), force=force)
    for asked_for in parse_loras(loras):  # before long work
        check_file(Path(asked_for.file))
    start = time.perf_counter()
    found = find_source(source, **options)
    program = with_loras(capture(found), loras, merged=True)
    with doing(f"writing {output}"):
        save_program(program, output, force=force, pipeline=found.pipeline, variant=found.notes.get("variant"))
    with doing("looking for what targets do not take"):
        takers = warn_unless_exportable(program, output)
    summary = {
        "program": str(output),
        "source": source,
        "sites": len(list(program.sites())),
        "nodes": len(program.graph.nodes),
        "weights_bytes": program.size_bytes(),
        "graph_equals_module_relative_error": program.origin.capture_error,
        "exports_to": takers if as_json else ", ".join(takers) or "no target",
        "seconds": round(time.perf_counter() - start, 2),
        **said_of(program),
        **found.notes,
        **left_out(found.module, program, found.pipeline, found.prefix),
    }
    out.print_json(summary) if as_json else out.fields(f"traced {source}", summary)
