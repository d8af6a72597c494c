"""The command that compiles an export: build-engine."""

from pathlib import Path

import click

from hqc.commands.options import json_option, options

__all__ = ["build_engine", "engine_options"]

engine_options = options(
    click.option(
        "--arch",
        metavar="NAMES",
        help="Comma-separated architectures (default: the GPU here, or without one sm_80,sm_86,sm_89,sm_120).",
    ),
    click.option("--min-batch", type=click.IntRange(1, 4096), default=1, show_default=True),
    click.option("--opt-batch", type=click.IntRange(1, 4096), help="Batch to optimise for (default: 2, in the range)."),
    click.option("--max-batch", type=click.IntRange(1, 4096), default=8, show_default=True),
    click.option("--workspace", type=click.IntRange(1, 2**20), metavar="MiB", help="Scratch memory of a kernel."),
    click.option(
        "--tf32/--no-tf32",
        default=True,
        show_default=True,
        help="Products of float32 on tensor cores, 10-bit mantissa.",
    ),
    click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        help="Keep engines by key and take them again (default: none for rtx, the user's cache for trt).",
    ),
)
"""What a build takes besides the builder; `hqc export --engine` takes the same."""


@click.command("build-engine")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--engine",
    "builder",
    type=click.Choice(["rtx", "trt"]),
    default="rtx",
    show_default=True,
    help="rtx: TensorRT-RTX, with or without a GPU; trt: TensorRT, for the GPU here.",
)
@engine_options
@click.option("--force", is_flag=True, help="Build again what is there.")
@json_option
def build_engine(
    folder: Path,
    builder: str,
    arch: str | None,
    min_batch: int,
    opt_batch: int | None,
    max_batch: int,
    workspace: int | None,
    tf32: bool,
    cache: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compile the model of FOLDER, an export for TensorRT, into engines beside it.

    Writes engine_*.plan and build.json, and adds every engine's layer list, with types and formats, to report.json.
    """
    from hqc import console as out
    from hqc.engines import BatchProfile, BuildOptions, build_engines
    from hqc.engines.architectures import parse_archs

    archs = parse_archs(arch) if arch is not None else ()
    profile = BatchProfile.of(min_batch, opt_batch, max_batch)
    report = build_engines(
        folder,
        builder,
        archs,
        BuildOptions(profile, workspace * 2**20 if workspace is not None else None, tf32),
        force=force,
        cache=cache,
        on_start=_say,
    )
    out.print_json(report.to_dict()) if as_json else click.echo(f"built {report}")


def _say(arch: str) -> None:
    """One line an architecture, where somebody looks."""
    from hqc import console as out

    if out.stderr.is_terminal:
        out.stderr.print(f"building for {arch}", markup=False, highlight=False)
