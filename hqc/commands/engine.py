"""The command that compiles an export: build-engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hqc.commands.options import json_option, options

if TYPE_CHECKING:
    from hqc.engines import BuildOptions, EngineReport

__all__ = ["EngineArguments", "build_engine", "engine_arguments", "engine_options"]

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


@dataclass(frozen=True)
class EngineArguments:
    """What the options of `engine_options` say, checked."""

    builder: str
    archs: tuple[str, ...]
    options: "BuildOptions"
    cache: Path | None

    def check(self) -> None:
        """Refuses what cannot be built here; for a command that does long work before it builds.

        Raises:
            HqcError: see `hqc.engines.check_request`.
        """
        from hqc.engines import check_request

        check_request(self.builder, self.archs)

    def build(self, folder: Path, *, force: bool = False) -> "EngineReport":
        """Builds into a folder; see `hqc.engines.build_engines`."""
        from hqc.engines import build_engines

        return build_engines(
            folder, self.builder, self.archs, self.options, force=force, cache=self.cache, on_start=_say
        )


def engine_arguments(
    builder: str,
    arch: str | None,
    min_batch: int,
    opt_batch: int | None,
    max_batch: int,
    workspace: int | None,
    tf32: bool,
    cache: Path | None,
) -> EngineArguments:
    """The options of `engine_options` as the Python API takes them.

    Raises:
        ExportError: for an architecture that does not exist, or batches that are no range.
    """
    from hqc.engines import BatchProfile, BuildOptions
    from hqc.engines.architectures import parse_archs

    profile = BatchProfile.of(min_batch, opt_batch, max_batch)
    workspace_bytes = workspace * 2**20 if workspace is not None else None
    archs = parse_archs(arch) if arch is not None else ()
    return EngineArguments(builder, archs, BuildOptions(profile, workspace_bytes, tf32), cache)


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

    asked = engine_arguments(builder, arch, min_batch, opt_batch, max_batch, workspace, tf32, cache)
    report = asked.build(folder, force=force)
    out.print_json(report.to_dict()) if as_json else click.echo(f"built {report}")


def _say(arch: str) -> None:
    """One line an architecture, where somebody looks."""
    from hqc import console as out

    if out.stderr.is_terminal:
        out.stderr.print(f"building for {arch}", markup=False, highlight=False)
