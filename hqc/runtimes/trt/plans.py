"""Which plan of an export runs here; everything that can be wrong with that is said before anything heavy is loaded.

A plan is bound to the version of the builder that made it, to the card's architecture, and to its range of batches.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqc.engines.architectures import KNOWN
from hqc.engines.architectures import RTX as RTX_ARCHS
from hqc.engines.build import build_engines
from hqc.engines.builders import BUILDERS, RTX, TRT, Builder, find_builder, release
from hqc.engines.gpus import Gpu, find_driver
from hqc.engines.options import BatchProfile, BuildOptions
from hqc.engines.record import EngineRecord, LoadedPlan, engine_name, load_plan, read_records
from hqc.errors import ArtefactError, HqcError, RuntimeMissingError

__all__ = ["NAME", "TARGET", "PlanOptions", "find_gpu", "find_plan", "needs_plugins", "read_manifest", "usable_here"]

NAME = "runtime tensorrt"
TARGET = "tensorrt"
ELSEWHERE = "Use runtime='onnxruntime' here, or the machine with the GPU."
PLUGINS_FILE = "plugins/plugins.json"


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is found.

    builder: `trt` or `rtx`; None takes TensorRT's if there is one, else TensorRT-RTX's. build: make the engine for this
    GPU if the folder has none, once; it stays in the folder. profile: batches that the engine must take; None: those
    that it has, or the default for one that is built. cache: of built engines, see `build_engines`.
    """

    builder: str | None = None
    build: bool = True
    profile: BatchProfile | None = None
    cache: Path | None = None


def find_plan(
    folder: Path,
    manifest: Mapping[str, Any],
    gpu: Gpu,
    options: PlanOptions,
    *,
    on_build: Callable[[str], None] | None = None,
) -> tuple[Builder, LoadedPlan]:
    """The builder whose runtime loads it, and the plan, read and checked. on_build: called before one is built.

    Raises:
        ArtefactError: if the plan is of another version, card, model or profile, or damaged.
        RuntimeMissingError: if the package that loads it, or one that could build it, is missing.
        ExportError: if it cannot be built.
    """
    records = read_records(folder)
    names = (options.builder,) if options.builder is not None else (TRT.name, RTX.name)
    builders = [find_builder(name) for name in names]
    here = [builder for builder in builders if engine_name(builder.name, gpu.arch) in records]
    if here:
        builder = _installed(here)
        record = records[engine_name(builder.name, gpu.arch)]
        _check_version(folder, record, builder)
        _check_profile(folder, record, options.profile)
    else:
        if not options.build:
            raise _no_plan(folder, records, gpu)
        builder = _builder_for(gpu, builders, plugins=needs_plugins(manifest))
        if on_build is not None:
            on_build(f"{builder.title} for {gpu.name}")
        chosen = BuildOptions(options.profile or BatchProfile())
        build_engines(folder, builder.name, (gpu.arch,), chosen, cache=options.cache)
    return builder, load_plan(folder, gpu.arch, builder=builder.name)


def find_gpu(index: int = 0) -> Gpu:
    """The GPU of a number, asked of the driver.

    Raises:
        RuntimeMissingError: if there is none.
    """
    driver = find_driver()
    if driver is None or not driver.gpus:
        found = "there is no NVIDIA driver here" if driver is None else "the driver finds no GPU here"
        raise RuntimeMissingError(NAME, found, ELSEWHERE)
    if index >= len(driver.gpus):
        raise RuntimeMissingError(NAME, f"there is no GPU {index}; there are {len(driver.gpus)}", "Choose another.")
    return driver.gpus[index]


def usable_here(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether an engine of this export can be loaded, or built and loaded, on this machine."""
    driver = find_driver()
    if driver is None or not driver.gpus:
        return False
    gpu = driver.gpus[0]
    try:
        records = read_records(folder)
        names = [name for name in BUILDERS if engine_name(name, gpu.arch) in records]
        if names:
            _installed([find_builder(name) for name in names])
        else:
            _builder_for(gpu, [TRT, RTX], plugins=needs_plugins(manifest))
    except HqcError:
        return False
    return True


def needs_plugins(manifest: Mapping[str, Any]) -> bool:
    """Whether the model has nodes that hqc's plugins run."""
    return PLUGINS_FILE in manifest["files"]


# ---- what can be wrong ---------------------------------------------------------------------------------------------


def _installed(builders: list[Builder]) -> Builder:
    """The first whose package is installed.

    Raises:
        RuntimeMissingError: about the first, if none is.
    """
    problems = []
    for builder in builders:
        try:
            builder.installed()
        except RuntimeMissingError as error:
            problems.append(RuntimeMissingError(NAME, error.found, error.do))
        else:
            return builder
    raise problems[0]


def _builder_for(gpu: Gpu, builders: list[Builder], *, plugins: bool) -> Builder:
    """One that builds for this GPU.

    Raises:
        RuntimeMissingError: if none can.
    """
    fitting = [b for b in builders if b is TRT or (gpu.arch in RTX_ARCHS and not plugins)]
    if not fitting:
        why = "takes no plugins" if plugins else f"does not build for {gpu.arch}"
        raise RuntimeMissingError(NAME, f"TensorRT-RTX {why}", f"Use TensorRT: {TRT.install}")
    return _installed(fitting)


def _check_version(folder: Path, record: EngineRecord, builder: Builder) -> None:
    """A plan is loaded by the version that built it, and no other."""
    here = builder.installed()
    if release(here) == release(record.builder_version):
        return
    raise ArtefactError(
        str(folder / record.file),
        f"was built with {builder.title} {record.builder_version}, here is {here}",
        f"Run `{_command(folder, builder.name)} --force`, or install {builder.packages[0]}=={record.builder_version}.",
    )


def _check_profile(folder: Path, record: EngineRecord, wanted: BatchProfile | None) -> None:
    if wanted is None:
        return
    has = BatchProfile(**record.options["profile"])
    if has.min <= wanted.min and wanted.max <= has.max:
        return
    sizes = f"--min-batch {min(has.min, wanted.min)} --max-batch {max(has.max, wanted.max)}"
    raise ArtefactError(
        str(folder / record.file),
        f"takes batches of {has.min}…{has.max}, {wanted.min}…{wanted.max} were asked for",
        f"Run `{_command(folder, record.builder)} {sizes} --force`.",
    )


def _no_plan(folder: Path, records: Mapping[str, EngineRecord], gpu: Gpu) -> ArtefactError:
    others = sorted({record.arch for record in records.values()})
    held = f"engines for {', '.join(f'{arch} ({KNOWN.get(arch, arch)})' for arch in others)}" if others else "no engine"
    builder = RTX.name if gpu.arch in RTX_ARCHS else TRT.name
    return ArtefactError(
        str(folder),
        f"holds {held}; the GPU here, {gpu.name}, is {gpu.arch}",
        f"Run `{_command(folder, builder)}` on this machine.",
    )


def _command(folder: Path, builder: str) -> str:
    return f"hqc build-engine {folder} --engine {builder}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json as it is, nothing checked but that it can be read.

    Raises:
        ArtefactError: if it cannot.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return {**manifest, "files": dict(manifest["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(str(folder / "manifest.json"), f"cannot be read ({error})", "Export it again.") from error
