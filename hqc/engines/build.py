"""`build_engines`: the model.onnx of an export folder becomes an engine for each architecture.

    FOLDER/engine_rtx_sm86.plan   the engine
    FOLDER/build.json             profiles, types, versions, options and digests of every engine
    FOLDER/report.json            with the layer list of every engine added to it

Everything is built beside the folder's files first and put in place at the end, so that a build that fails leaves the
folder as it was.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqc.atomic import write_file
from hqc.claims import claimed, clear_away, mark, remove_tree
from hqc.engines.architectures import DEFAULT, capability, check_known, check_rtx
from hqc.engines.architectures import RTX as RTX_ARCHS
from hqc.engines.builder_process import run_builder
from hqc.engines.builders import TRT, Builder, find_builder
from hqc.engines.cache import check_cache, default_cache, find_engine, keep_engine, timing_cache
from hqc.engines.gpus import find_driver
from hqc.engines.key import PLUGINS, engine_key, plugins_digest
from hqc.engines.layers import coverage, engine_layers
from hqc.engines.network import Network, Shapes, profile_shapes, read_network
from hqc.engines.options import BuildOptions
from hqc.engines.record import (
    BUILD_FILE,
    EngineRecord,
    build_text,
    engine_name,
    file_sha256,
    folder_digest,
    read_records,
)
from hqc.engines.report import BuiltEngine, EngineReport
from hqc.engines.requests import Answer, BuildRequest
from hqc.errors import ArtefactError, ExportError, RuntimeMissingError
from hqc.memory import require_memory
from hqc.paths import StrPath
from hqc.storage import check_manifest

__all__ = ["build_engines", "check_request"]

MODEL, REPORT, MANIFEST = "model.onnx", "report.json", "manifest.json"
ENGINES = "engines"
"""What a build is called in the name of its hidden folder."""
EXPORT_KIND = "hqc-export"
TARGET = "tensorrt"


def check_request(builder: str, archs: Sequence[str] = ()) -> tuple[Builder, str, tuple[str, ...]]:
    """The builder, its version and the architectures; refuses what cannot be built here, before any work.

    archs: none for `rtx` is that of the GPUs here, or without one `architectures.DEFAULT`; for `trt` only that of
        the GPU here.

    Raises:
        ExportError: if an architecture is unknown, or not one that the builder builds for here.
        RuntimeMissingError: if the builder, or for `trt` a GPU, is missing.
    """
    found = find_builder(builder)
    if found is TRT:
        return _check_trt(archs)
    check_rtx(archs)
    driver = find_driver()
    here = dict.fromkeys(gpu.arch for gpu in (driver.gpus if driver else ()) if gpu.arch in RTX_ARCHS)
    return found, found.installed(), tuple(dict.fromkeys(archs)) or tuple(here) or DEFAULT


def _check_trt(archs: Sequence[str]) -> tuple[Builder, str, tuple[str, ...]]:
    check_known(archs)
    version = TRT.installed()
    driver = find_driver()
    if driver is None or not driver.gpus:
        raise RuntimeMissingError(
            f"builder {TRT.name}",
            "there is no NVIDIA GPU here, and TensorRT times its kernels on the card that the engine is for",
            "Build on the machine that runs the engine, or with --engine rtx, which needs no GPU.",
        )
    here = driver.gpus[0].arch
    if others := [arch for arch in archs if arch != here]:
        raise ExportError(
            f"architecture {', '.join(others)}",
            f"the GPU here ({driver.gpus[0].name}) is {here}, and TensorRT builds for the card that it runs on",
            "Leave --arch out, or build on a machine with that card.",
        )
    return TRT, version, (here,)


def build_engines(
    folder: StrPath,
    builder: str = "rtx",
    archs: Sequence[str] = (),
    options: BuildOptions | None = None,
    *,
    force: bool = False,
    cache: StrPath | None = None,
    on_start: Callable[[str], None] | None = None,
) -> EngineReport:
    """Builds one engine an architecture, each in a process of its own, and puts them into the folder together.

    Args:
        folder: what `hqc export --target tensorrt` wrote.
        builder: `rtx` (TensorRT-RTX, with or without a GPU) or `trt` (TensorRT, on the machine with the GPU).
        archs: see `check_request`.
        options: profile of batches and settings; None: the defaults.
        force: replace engines that are there, in the folder and in the cache.
        cache: engines by key, taken from there and kept there; None: none for `rtx`, `default_cache()` for `trt`.
        on_start: called with the architecture when its build starts.

    Raises:
        ExportError: if the request cannot be met, or the builder refuses the model or crashes.
        RuntimeMissingError: if the builder, or the GPU that it needs, is missing.
        ArtefactError: if the folder is not such an export, is damaged, cannot be written, or holds the engine already.
    """
    start, options = time.perf_counter(), options or BuildOptions()
    found, version, archs = check_request(builder, archs)
    folder = Path(folder)
    manifest, network = _read_export(folder)
    shapes = profile_shapes(network, options.profile)
    _check_plugins(folder, found, network, manifest["files"])
    with claimed(folder, stays=True):
        clear_away(folder / ENGINES)
        records = read_records(folder)
        if (there := [a for a in archs if engine_name(builder, a) in records]) and not force:
            raise ArtefactError(
                str(folder),
                f"already holds {', '.join(records[engine_name(builder, a)].file for a in there)}",
                "Give --force to build again.",
            )
        kept = Path(cache) if cache is not None else default_cache() if found is TRT else None
        if kept is not None:
            check_cache(kept)
        require_memory(f"building engines for {folder}", _build_bytes(folder, network.nodes), "Close other programs")
        with _staging(folder) as stage:
            job = _Job(folder, stage, found, version, options, network, shapes, manifest["files"], kept, force)
            built = []
            for arch in archs:
                if on_start is not None:
                    on_start(arch)
                built.append(job.build(arch))
            records |= {engine.record.name: engine.record for engine in built}
            records = {name: record for name, record in records.items() if record.onnx == job.onnx}
            (stage / BUILD_FILE).write_text(build_text(records, job.onnx_facts()), encoding="utf-8")
            _extend_report(folder, stage, manifest, built)
    return EngineReport(folder, tuple(built), round(time.perf_counter() - start, 3))


@dataclass(frozen=True)
class _Job:
    """What the builds of one call share."""

    folder: Path
    stage: Path
    builder: Builder
    version: str
    options: BuildOptions
    network: Network
    shapes: Shapes
    files: Mapping[str, Any]
    cache: Path | None
    force: bool

    @property
    def onnx(self) -> str:
        return folder_digest(self.folder)

    def onnx_facts(self) -> dict[str, Any]:
        """What build.json says of the model."""
        names = (MODEL, *self.network.data_files)
        return {
            "digest": self.onnx,
            "files": {name: self.files[name]["sha256"] for name in names},
            "opset": self.network.opset,
            "producer": self.network.producer,
        }

    def build(self, arch: str) -> BuiltEngine:
        """One engine, from the cache or built, in the staging folder."""
        plan = self.stage / f"engine_{engine_name(self.builder.name, arch)}.plan"
        key = engine_key(
            onnx=self.onnx,
            builder=self.builder.name,
            builder_version=self.version,
            compute_capability=capability(arch),
            options=self.options,
            plugins=self.plugins,
        )
        kept = find_engine(self.cache, key) if self.cache is not None and not self.force else None
        if kept is not None:
            shutil.copyfile(kept[0], plan)
            answer = kept[1]
        else:
            answer = run_builder(self.builder, self._request(arch, plan), where=str(self.folder / MODEL))
            if self.cache is not None:
                keep_engine(self.cache, key, plan, answer)
        layers = engine_layers(answer.layers, _sites(self.folder), self.network.products)
        record = self._record(arch, plan, key, answer)
        return BuiltEngine(record, layers, coverage(layers, self.network.products), kept is not None)

    @property
    def plugins(self) -> str:
        """The digest of the plugins that the model needs; empty if it needs none."""
        return plugins_digest(self.files) if self.network.plugins else ""

    def _request(self, arch: str, plan: Path) -> BuildRequest:
        timings = None
        if self.cache is not None and self.builder is TRT:
            timings = str(timing_cache(self.cache, arch, self.version, self.plugins))
        return BuildRequest(
            onnx=str(self.folder / MODEL),
            plan=str(plan),
            log=str(self.stage / "build.log"),
            arch=arch,
            shapes=self.shapes,
            workspace_bytes=self.options.workspace_bytes,
            tf32=self.options.tf32,
            timing_cache=timings,
            plugins=bool(self.network.plugins),
        )

    def _record(self, arch: str, plan: Path, key: str, answer: Answer) -> EngineRecord:
        return EngineRecord(
            file=plan.name,
            builder=self.builder.name,
            builder_version=answer.builder_version,
            arch=arch,
            onnx=self.onnx,
            key=key,
            options=self.options.to_dict(),
            shapes={name: [list(shape) for shape in triple] for name, triple in self.shapes.items()},
            dtypes=dict(answer.dtypes or {}),
            sha256=file_sha256(plan),
            size_bytes=plan.stat().st_size,
            seconds=answer.seconds,
            peak_resident_bytes=answer.peak_resident_bytes,
        )


def _read_export(folder: Path) -> tuple[Mapping[str, Any], Network]:
    """The manifest, every hash checked, and the facts of the model.

    Raises:
        ArtefactError: if the folder is not a whole export for TensorRT by this version of hqc.
    """
    manifest = check_manifest(folder, EXPORT_KIND)
    if manifest.get("target") != TARGET:
        raise ArtefactError(
            str(folder), f"is an export for {manifest.get('target')!r}", "Export with --target tensorrt."
        )
    network = read_network(folder / MODEL)
    if missing := [name for name in (MODEL, *network.data_files) if name not in manifest["files"]]:
        raise ArtefactError(str(folder), f"has a manifest that does not list {missing[0]}", "Export it again.")
    if network.producer.split()[:1] != ["hqc"]:
        raise ArtefactError(
            str(folder / MODEL), f"was written by {network.producer or 'an unknown program'!r}", "Export it with hqc."
        )
    return manifest, network


def _check_plugins(folder: Path, builder: Builder, network: Network, files: Mapping[str, Any]) -> None:
    """TensorRT-RTX has no way to add a plugin: its process ends when it meets one. TensorRT needs their kernels."""
    if not network.plugins:
        return
    names = ", ".join(network.plugins)
    if builder is not TRT:
        raise ExportError(
            str(folder / MODEL),
            f"holds plugin nodes ({names}), and TensorRT-RTX takes no plugins",
            "Export with --plugins none, or build with --engine trt.",
        )
    if not plugins_digest(files):
        raise ArtefactError(
            str(folder), f"holds plugin nodes ({names}) and no {PLUGINS} with their kernels", "Export it again."
        )


def _sites(folder: Path) -> tuple[str, ...]:
    """The sites of the quantisation plan."""
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        return tuple(entry["site"] for entry in plan["sites"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(str(folder / "plan.json"), f"cannot be read ({error})", "Export it again.") from error


def _build_bytes(folder: Path, nodes: int) -> int:
    """Memory that one build takes: the builder's library, what it keeps of every node, the model four times over.

    Measured with TensorRT-RTX 1.7: 222 MB for 20 nodes, 652 MB for digits with 1 646 nodes and 5 MB.
    """
    return 250_000_000 + 300_000 * nodes + 4 * sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder`; what lies in it at the end is moved into `folder`, the plans first.

    Raises:
        ArtefactError: if the folder cannot be written.
    """
    stage = folder / f"{mark(folder / ENGINES)}{secrets.token_hex(4)}"
    try:
        stage.mkdir()
        yield stage
        (stage / "build.log").unlink(missing_ok=True)
        new = sorted(stage.iterdir(), key=lambda path: _ORDER.get(path.name, 0))
        for path in new:
            with path.open("r+b") as file:  # Windows syncs what may be written only
                os.fsync(file.fileno())
        if stage / MANIFEST in new:
            _unlist_report(folder)
        for path in new:
            os.replace(path, folder / path.name)
    except OSError as error:
        raise ArtefactError(
            str(folder), f"could not be written ({error})", "Free some space or choose another folder."
        ) from error
    finally:
        remove_tree(stage)


def _unlist_report(folder: Path) -> None:
    """Takes report.json out of the manifest, so that at no moment the one has another hash than the other says."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["files"].pop(REPORT, None) is not None:
        write_file(folder / MANIFEST, _manifest_text(manifest).encode())


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, allow_nan=False) + "\n"


_ORDER = {BUILD_FILE: 1, REPORT: 2, MANIFEST: 3}
"""Each is put in place after what it speaks of."""


def _extend_report(folder: Path, stage: Path, manifest: Mapping[str, Any], built: Sequence[BuiltEngine]) -> None:
    """report.json with the engines; the manifest with its new hash."""
    path = folder / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        engines = {**report.get("engines", {}), **{engine.record.name: engine.to_dict() for engine in built}}
    except (ValueError, AttributeError, TypeError) as error:
        raise ArtefactError(str(path), f"cannot be read ({error})", "Export it again.") from error
    new = stage / REPORT
    new.write_text(json.dumps({**report, "engines": engines}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files = {**manifest["files"], REPORT: {"sha256": file_sha256(new), "size": new.stat().st_size}}
    (stage / MANIFEST).write_text(_manifest_text({**manifest, "files": files}), encoding="utf-8")
