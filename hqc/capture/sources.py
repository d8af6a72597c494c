"""What `hqc trace` accepts: `digits`, a diffusers pipeline or denoiser folder, a hub id, a checkpoint file with its
configuration, `arch:NAME`, or `module:callable`."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from hqc.capture.architectures import ARCHITECTURE, from_architecture
from hqc.capture.autoencoders import Part, from_autoencoder
from hqc.capture.averaged_folders import choose_part
from hqc.capture.averages import Weights
from hqc.capture.constants import fold_grids
from hqc.capture.diffusers_models import CaptureOptions, from_folder, from_pipeline
from hqc.capture.export_graph import capture_module
from hqc.capture.families import PACKED
from hqc.capture.hub import fetch_snapshot, is_hub_id
from hqc.capture.source import Source
from hqc.capture.user_callable import from_callable
from hqc.errors import CaptureError
from hqc.paths import StrPath
from hqc.program import Program
from hqc.sizes import LatentSize, as_size, sides
from hqc.stages import doing

__all__ = ["Source", "SourceOptions", "find_source", "trace"]

CHECKPOINTS = (".ckpt", ".safetensors")
_SOURCES = (
    "`digits`, a diffusers pipeline or denoiser folder, a hub id, a .ckpt or .safetensors file with --config, "
    "`arch:NAME`, or `module:callable`"
)


class SourceOptions(TypedDict, total=False):
    """The keywords of `find_source`, which says what they mean."""

    condition_length: int | None
    latent_size: LatentSize | None
    config: StrPath | None
    outliers: bool
    revision: str | None
    weights: Weights | None
    variant: str | None
    part: Part


def trace(source: StrPath | Source, **options: Unpack[SourceOptions]) -> Program:
    """Captures a source into a Program; `source` and the options as `find_source` takes them, or a `Source`.

    Raises:
        CaptureError: if the source is unknown or cannot be captured.
    """
    if not isinstance(source, Source):
        source = find_source(source, **options)
    with doing(f"capturing {source.origin.source or 'the module'}"):
        program = fold_grids(capture_module(source.module, source.inputs, source.origin, prefix=source.prefix))
    return _without_prefix(program, source.prefix) if source.prefix else program


def _without_prefix(program: Program, prefix: str) -> Program:
    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix(prefix)
            node.name = str(node.target).replace(".", "_")
        for key in ("site", "scope"):
            if key in node.meta:
                node.meta[key] = node.meta[key].removeprefix(prefix)
        if node.meta.get("scope") == prefix.removesuffix("."):
            del node.meta["scope"]
    return program.evolve(state={k.removeprefix(prefix): v for k, v in program.state.items()})


def _applied(source: Source, name: str, options: CaptureOptions) -> Source:
    """The source, if it took the sizes that were asked for.

    Raises:
        CaptureError: if it has no such size.
    """
    shapes = {spec.name: spec.shape for spec in source.inputs}
    length, size = options.condition_length, options.latent_size
    if length is not None and ("condition" not in shapes or shapes["condition"][1] != length):
        has = f"its condition has {shapes['condition'][1]} token" if "condition" in shapes else "it has no condition"
        raise CaptureError(f"source {name!r}", f"takes no --condition-length: {has}", "Leave it out.")
    sample = shapes.get("sample", ())
    if size is not None and sample[-2:] != sides(size) and source.origin.kind not in PACKED:
        raise CaptureError(
            f"source {name!r}",
            f"takes no --latent-size: its sample is {list(sample[1:])}",
            "Leave it out; `module:callable` gives the sizes itself.",
        )
    return source


def find_source(
    source: StrPath,
    *,
    condition_length: int | None = None,
    latent_size: LatentSize | None = None,
    config: StrPath | None = None,
    outliers: bool = False,
    revision: str | None = None,
    weights: Weights | None = None,
    variant: str | None = None,
    part: Part = "denoiser",
) -> Source:
    """Resolves what the user typed; see the module's first lines.

    condition_length: tokens of the condition. latent_size: side of the latents, or (height, width). Without, the
    source's own.
    config: of a checkpoint file alone: the YAML file of the original code, or the config.json of diffusers. outliers:
    of a named architecture. revision: branch, tag or commit of a hub id. weights: of a source that has raw and averaged
    ones, the averaged ones without it. variant: of the weights in a diffusers folder or hub id. part: of a pipeline, or
    of an autoencoder's own folder, a half of the autoencoder.

    Raises:
        CaptureError: if it is none of these, or an option does not belong to it.
    """
    source = os.fspath(source)
    is_checkpoint = Path(source).suffix in CHECKPOINTS
    _check_options(source, config is not None, is_checkpoint, outliers)
    if revision is not None and (not is_hub_id(source) or Path(source).exists()):
        raise CaptureError(f"source {source!r}", "takes no --revision", "Leave it out; it belongs to a hub id.")
    is_folder = source != "digits" and (Path(source).is_dir() or is_hub_id(source))
    if weights is not None and not is_checkpoint and not is_folder:
        raise CaptureError(
            f"source {source!r}",
            "takes no --weights",
            "Leave it out; it belongs to a file, a folder or hub id.",
        )
    if variant is not None and not is_folder:
        raise CaptureError(
            f"source {source!r}", "takes no --variant", "Leave it out; it belongs to a folder or hub id."
        )
    options = CaptureOptions(condition_length, _checked_size(latent_size), weights, variant)
    if part != "denoiser" and source != "digits" and not is_folder:
        raise CaptureError(
            f"source {source!r}", f"takes no --part {part}", "Leave it out; it belongs to `digits`, a folder or hub id."
        )
    with doing(f"reading {source}"):
        if part != "denoiser":
            return _half(source, revision, part, options)
        return _applied(_found(source, config, outliers, revision, options), source, options)


def _half(source: str, revision: str | None, part: Part, options: CaptureOptions) -> Source:
    """A half of the autoencoder of `digits`, a folder or a hub id."""
    if source == "digits":
        from hqc.models import digits_path

        return from_autoencoder(digits_path(), source, part, options)
    if Path(source).exists():
        return from_autoencoder(Path(source), str(Path(source).resolve()), part, options)
    folder, commit = fetch_snapshot(source, revision, options.variant)
    found = from_autoencoder(folder, source, part, options)
    return replace(found, origin=replace(found.origin, revision=commit))


def _checked_size(size: LatentSize | None) -> LatentSize | None:
    try:
        return None if size is None else as_size(size)
    except ValueError as error:
        raise CaptureError("latent_size", f"is {error}", "Give one of these.") from error


def _found(
    source: str, config: StrPath | None, outliers: bool, revision: str | None, options: CaptureOptions
) -> Source:
    is_checkpoint = Path(source).suffix in CHECKPOINTS
    if source == "digits":
        from hqc.models import digits_path

        return from_pipeline(digits_path(), "digits", options)
    if source.startswith(ARCHITECTURE):
        return from_architecture(
            source,
            condition_length=options.condition_length,
            latent_size=options.latent_size,
            outliers=outliers,
        )
    if is_checkpoint and not Path(source).is_dir() and (config is None or Path(config).suffix == ".json"):
        from hqc.capture.single_file import from_single_file

        return from_single_file(Path(source), Path(config) if config is not None else None, options)
    if is_checkpoint and config is not None:
        from hqc.capture.ldm import from_checkpoint

        return from_checkpoint(Path(source), Path(config), options)
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        return from_pipeline(folder, str(folder.resolve()), options)
    if (folder / "config.json").is_file():
        return from_folder(folder, str(folder.resolve()), options, None)
    if choose_part(folder, options.weights) is not None:
        return from_pipeline(folder, str(folder.resolve()), options)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source):
        return from_callable(source)
    if is_hub_id(source) and not folder.exists():
        return _from_hub(source, revision, options)
    what = "a folder without model_index.json or config.json" if folder.is_dir() else "nothing that hqc can trace"
    raise CaptureError(f"source {source!r}", f"is {what}", f"Give {_SOURCES}.")


def _from_hub(name: str, revision: str | None, options: CaptureOptions) -> Source:
    variant = options.variant or ("non_ema" if options.weights == "raw" else None)
    folder, commit = fetch_snapshot(name, revision, variant)
    if (folder / "model_index.json").is_file():
        found = from_pipeline(folder, name, options)
    else:
        found = from_folder(folder, name, options, None)
    return replace(found, origin=replace(found.origin, revision=commit))


def _check_options(source: str, has_config: bool, is_checkpoint: bool, outliers: bool) -> None:
    if has_config and not is_checkpoint:
        raise CaptureError(
            f"source {source!r}", "takes no --config", "Leave it out; it belongs to a .ckpt or .safetensors file."
        )
    if outliers and not source.startswith(ARCHITECTURE):
        raise CaptureError(f"source {source!r}", "takes no --outliers", "Leave it out; it belongs to `arch:NAME`.")
