"""`hqc export --target triton`: an export as a model of Triton Inference Server."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hqc.commands.options import Decorator, options

if TYPE_CHECKING:
    from hqc.triton_server.repository import Device

__all__ = ["export_triton", "triton_options"]

triton_options: Decorator = options(
    click.option(
        "--max-batch-size",
        type=click.IntRange(1, 4096),
        help="triton: samples in one call (default: 8, or what the engine takes).",
    ),
    click.option("--device", type=click.Choice(["cpu", "gpu"]), help="triton: where a portable export runs."),
)


def export_triton(
    export: Path,
    output: Path,
    *,
    max_batch_size: int | None,
    device: "Device | None",
    force: bool,
    as_json: bool,
) -> None:
    """Writes the model, and prints what was written."""
    from hqc import console as out
    from hqc.triton_server import write_triton_model

    written = write_triton_model(export, output, max_batch_size=max_batch_size, device=device, force=force)
    if as_json:
        out.print_json(written.to_dict())
    else:
        click.echo(f"exported {written}")
