"""The command that compiles an export: build-engine; and its options, which export takes too."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import Command
from hqc.commands.options import Decorator, json_option, options
from hqc.stages import doing

if TYPE_CHECKING:
    from hqc.engines import BuildOptions, EngineReport

__all__ = ["EngineArguments", "build_engine", "engine_options"]


@dataclass(frozen=True)
class EngineArguments:
    """What the options of `engine_options` say."""

    builder: str
    archs: tuple[str, ...]
    options: "BuildOptions"
    cache: Path | None

    def check(self, *, target: str, plugins: str | None) -> None:
        """Refuses what cannot be built from such an export, or not here, before the export starts.

        Raises:
            HqcError: see `hqc.engines.check_request`.
        """
        from hqc.engines import check_request
        from hqc.errors import ExportError

        if target != "tensorrt":
            raise ExportError(f"--engine {self.builder}", f"is not for target {target}", "Give --target tensorrt.")
        if self.builder == "rtx" and plugins == "qdp":
            raise ExportError("--engine rtx", "takes no plugins", "Leave --plugins qdp out, or give --engine trt.")
        check_request(self.builder, self.archs)

    def build(self, folder: Path, *, force: bool = False) -> "EngineReport":
        """Builds into a folder; see `hqc.engines.build_engines`."""
        from hqc.engines import build_engines

        with doing("building engines") as stage:
            return build_engines(
                folder,
                self.builder,
                self.archs,
                self.options,
                force=force,
                cache=self.cache,
                on_start=lambda arch: stage(0, 0, f"for {arch}"),
            )


_OPTIONS = options(
    click.option(
        "--arch",
        metavar="NAMES",
        help="Comma-separated architectures (default: the GPU here, or without one sm_80,sm_86,sm_89,sm_120).",
    ),
    click.option("--min-batch", type=click.IntRange(1, 4096), help="Smallest batch of an engine (default: 1)."),
    click.option("--opt-batch", type=click.IntRange(1, 4096), help="Batch to optimise for (default: 2, in the range)."),
    click.option("--max-batch", type=click.IntRange(1, 4096), help="Largest batch of an engine (default: 8)."),
    click.option("--workspace", type=click.IntRange(1, 2**20), metavar="MiB", help="Scratch memory of a kernel."),
    click.option(
        "--tf32/--no-tf32",
        default=None,
        help="Products of float32 on tensor cores, 10-bit mantissa (default: as the builders do, yes).",
    ),
    click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        help="Keep engines by key and take them again (default: none for rtx, the user's cache for trt).",
    ),
)


def engine_options(default: str | None) -> Decorator:
    """The options of a build, which the command is given as one argument, `engine`: EngineArguments.

    default: the builder; None for a command that builds only with --engine, and is given None without it.
    """
    note = "" if default is None else f" (default: {default})"
    choice = click.option(
        "--engine",
        "builder",
        type=click.Choice(["rtx", "trt"]),
        default=default,
        help=f"Builder of engines: TensorRT-RTX, with or without a GPU, or TensorRT, for the GPU here{note}.",
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def collected(*, builder: str | None, **given: Any) -> Any:
            names = ("arch", "min_batch", "opt_batch", "max_batch", "workspace", "tf32", "cache")
            settings = {name: given.pop(name) for name in names}
            return command(engine=_arguments(builder, **settings), **given)

        return choice(_OPTIONS(collected))  # type: ignore[no-any-return]

    return decorate


def _arguments(
    builder: str | None,
    *,
    arch: str | None,
    min_batch: int | None,
    opt_batch: int | None,
    max_batch: int | None,
    workspace: int | None,
    tf32: bool | None,
    cache: Path | None,
) -> EngineArguments | None:
    """What the options say.

    Raises:
        ExportError: for an architecture that does not exist, batches that are no range, or options without a builder.
    """
    from hqc.engines import BatchProfile, BuildOptions
    from hqc.engines.architectures import parse_archs
    from hqc.errors import ExportError

    if builder is None:
        batches = {"--min-batch": min_batch, "--opt-batch": opt_batch, "--max-batch": max_batch}
        others = {"--arch": arch, **batches, "--workspace": workspace, "--tf32/--no-tf32": tf32, "--cache": cache}
        if given := [name for name, value in others.items() if value is not None]:
            raise ExportError(given[0], "is for engines, and none is asked for", "Give --engine too.")
        return None
    profile = BatchProfile.of(min_batch or BatchProfile.min, opt_batch, max_batch or BatchProfile.max)
    workspace_bytes = workspace * 2**20 if workspace is not None else None
    archs = parse_archs(arch) if arch is not None else ()
    return EngineArguments(builder, archs, BuildOptions(profile, workspace_bytes, tf32 is not False), cache)


@click.command("build-engine", cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@engine_options("rtx")
@click.option("--force", is_flag=True, help="Build again what is there.")
@json_option
def build_engine(folder: Path, engine: EngineArguments, force: bool, as_json: bool) -> None:
    """Compile the model of FOLDER, an export for TensorRT, into engines beside it.

    Writes engine_*.plan and build.json, and adds every engine's layer list, with types and formats, to report.json.
    """
    from hqc import console as out

    report = engine.build(folder, force=force)
    out.print_json(report.to_dict()) if as_json else click.echo(f"built {report}")
