"""`write_triton_model`: an export as a model of Triton Inference Server. The folder that it lies in is the repository.

REPOSITORY/NAME/config.pbtxt             name, platform, inputs, outputs, batching, where it runs
REPOSITORY/NAME/1/model.onnx             of an export for onnxruntime or portable, with model.onnx.data if there is one
REPOSITORY/NAME/1/model.plan             of an export for TensorRT with one engine by TensorRT
REPOSITORY/NAME/1/engine_trt_sm86.plan   … with several: Triton takes the one for its card
REPOSITORY/NAME/manifest.json            kind hqc-triton: sha256 and size of every file; Triton leaves it alone
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx

from hqc.atomic import atomic_folder, refuse_nested
from hqc.engines.architectures import capability
from hqc.engines.builders import TRT, release
from hqc.engines.record import EngineRecord, load_plan, read_records
from hqc.errors import ArtefactError, ExportError
from hqc.export.files import DATA_FILE, MODEL_FILE
from hqc.manifests import check_manifest, write_manifest
from hqc.paths import StrPath
from hqc.stages import doing
from hqc.triton_server.config import DTYPES, ModelConfig, Platform, Port

__all__ = ["TRITON_KIND", "Device", "TritonModel", "write_triton_model"]

Device = Literal["cpu", "gpu"]

TRITON_KIND = "hqc-triton"
CONFIG, VERSION, PLAN = "config.pbtxt", "1", "model.plan"
DEFAULT_BATCH = 8
PLUGINS_FILE = "plugins/plugins.json"
_EXPORT_KIND = "hqc-export"
_AHEAD_OF_TIME = "10.9"
"""Engines by older releases want the plugins registered by Python in the process that loads them."""


@dataclass(frozen=True)
class TritonModel:
    """What was written. note: why calls are not batched, where they are not."""

    folder: Path
    config: ModelConfig
    files: tuple[str, ...]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        config = self.config
        return {
            "model": str(self.folder),
            "name": config.name,
            "platform": config.platform,
            "device": "gpu" if config.gpu else "cpu",
            "max_batch_size": config.max_batch,
            "files": list(self.files),
        }

    def __str__(self) -> str:
        config = self.config
        lines = [
            f"{self.folder}: {config.platform}, {'GPU' if config.gpu else 'CPU'}, max_batch_size {config.max_batch}, "
            f"{', '.join(self.files)}"
        ]
        if self.note:
            lines.append(f"batching {self.note}")
        lines.append(f"serve    tritonserver --model-repository={self.folder.resolve().parent}")
        return "\n".join(lines)


def write_triton_model(
    export: StrPath,
    folder: StrPath,
    *,
    max_batch_size: int | None = None,
    device: Device | None = None,
    force: bool = False,
) -> TritonModel:
    """Writes an export as a model of Triton Inference Server.

    Args:
        export: what `hqc export` wrote; for TensorRT with an engine by TensorRT, which is what is served.
        folder: the model's; its last part is the model's name, and the folder that it lies in the model repository.
        max_batch_size: samples that Triton may put into one call; None: 8, or the largest batch of the engines.
        device: where ONNX Runtime runs a portable export; None: on the CPU. An engine runs on a GPU.
        force: replace an artefact that exists.

    Raises:
        ArtefactError: if the export or one of its engines is damaged, or the folder exists or cannot be written.
        ExportError: if Triton cannot take the export, or not with these options.
    """
    export, folder = Path(export), Path(folder)
    refuse_nested(folder, export)
    manifest = check_manifest(export, _EXPORT_KIND)
    find = _engines if manifest.get("target") == "tensorrt" else _model
    served = find(export, manifest, device)
    inputs, outputs = _ports(export / MODEL_FILE, served.dtypes)
    note = _unbatched(inputs, outputs)
    config = ModelConfig(
        folder.resolve().name,
        served.platform,
        inputs,
        outputs,
        _max_batch(max_batch_size, served.largest_batch, note),
        served.gpu,
        served.cards,
    )
    with doing(f"writing {folder}"), atomic_folder(folder, force=force) as temporary:
        (temporary / VERSION).mkdir()
        for name, source in served.files.items():
            shutil.copyfile(source, temporary / VERSION / name)
        (temporary / CONFIG).write_text(config.text(), encoding="utf-8")
        write_manifest(temporary, TRITON_KIND, _fields(manifest, config))
    return TritonModel(folder, config, tuple(f"{VERSION}/{name}" for name in served.files), note)


@dataclass(frozen=True)
class _Served:
    """What Triton loads.

    files: their names in the version's folder -> where they are. largest_batch: that an engine takes. dtypes: of the
    inputs and outputs of an engine. cards: compute capability -> file, of several engines.
    """

    platform: Platform
    gpu: bool
    files: Mapping[str, Path]
    largest_batch: int | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    cards: Mapping[str, str] = field(default_factory=dict)


def _model(export: Path, manifest: Mapping[str, Any], device: Device | None) -> _Served:
    """The ONNX file of an export for ONNX Runtime or any runtime."""
    target = manifest.get("target")
    if device == "gpu" and target != "portable":
        found = f"{export} is for {target}, whose integer products have kernels for CPUs alone"
        raise ExportError("--device gpu", found, "Leave it out, or export with --target portable or tensorrt.")
    names = [name for name in (MODEL_FILE, DATA_FILE) if name in manifest["files"]]
    if MODEL_FILE not in names:
        raise ArtefactError(str(export), f"lists no {MODEL_FILE}", "Export it again.")
    return _Served("onnxruntime_onnx", device == "gpu", {name: export / name for name in names})


def _engines(export: Path, manifest: Mapping[str, Any], device: Device | None) -> _Served:
    """The engines of an export for TensorRT; TensorRT-RTX's are nothing that Triton loads."""
    if device == "cpu":
        do = "Leave it out, or export with --target onnxruntime."
        raise ExportError("--device cpu", f"{export} is for TensorRT, which runs on GPUs alone", do)
    plugins = PLUGINS_FILE in manifest["files"] or manifest.get("tensorrt", {}).get("plugins") == "qdp"
    records = [record for record in read_records(export).values() if record.builder == TRT.name]
    if not records:
        found = "has plugin nodes, which" if plugins else "is ONNX for TensorRT's builder, whose forms"
        found = f"{found} ONNX Runtime does not run as they are meant, and holds no engine by TensorRT"
        raise ExportError(str(export), found, f"Run `hqc build-engine {export} --engine trt` first.")
    for record in records:
        _check_engine(export, record, plugins=plugins)
        load_plan(export, record.arch, builder=TRT.name)
    largest = min(_batches(record)[1] for record in records)
    sources = {record.file: export / record.file for record in records}
    if len(records) == 1:
        return _Served("tensorrt_plan", True, {PLAN: sources[records[0].file]}, largest, records[0].dtypes)
    cards = {".".join(map(str, capability(record.arch))): record.file for record in records}
    return _Served("tensorrt_plan", True, sources, largest, records[0].dtypes, cards)


def _check_engine(export: Path, record: EngineRecord, *, plugins: bool) -> None:
    """Triton loads a plan by itself, without Python, and sends it as few samples as one."""
    where = str(export / record.file)
    again = f"Run `hqc build-engine {export} --engine trt --force"
    if plugins and release(record.builder_version) < release(_AHEAD_OF_TIME):
        found = f"is by TensorRT {record.builder_version}, whose plugins are Python; Triton loads an engine without"
        raise ExportError(where, found, f"{again}` with TensorRT {_AHEAD_OF_TIME} or later.")
    smallest = _batches(record)[0]
    if smallest > 1 and record.shapes:
        raise ExportError(where, f"takes batches from {smallest}, and Triton sends single samples", f"{again}`.")


def _batches(record: EngineRecord) -> tuple[int, int]:
    """The smallest and the largest batch of an engine.

    Raises:
        ArtefactError: if its record does not say it.
    """
    try:
        return int(record.options["profile"]["min"]), int(record.options["profile"]["max"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            record.file, f"has a record without batches ({error})", "Build the engine again."
        ) from error


def _ports(model: Path, dtypes: Mapping[str, str]) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of a model, read without its weights; dtypes: those of an engine, which has them already."""
    graph = onnx.load(str(model), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    return tuple(_port(v, dtypes) for v in inputs), tuple(_port(v, dtypes) for v in graph.output)


def _port(value: onnx.ValueInfoProto, dtypes: Mapping[str, str]) -> Port:
    kind = value.type.tensor_type
    dtype = dtypes.get(value.name) or onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    if dtype not in DTYPES:
        raise ExportError(f"{value.name}", f"is {dtype}, which Triton has no type for", "Export it again.")
    sizes = (dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return Port(value.name, DTYPES[dtype], tuple(sizes))


def _unbatched(inputs: Sequence[Port], outputs: Sequence[Port]) -> str:
    """Why Triton cannot batch calls; empty where it can."""
    names = [port.name for port in (*inputs, *outputs) if not port.batched]
    return f"off: {', '.join(names)} without a batch dimension; a call has full shapes" if names else ""


def _max_batch(asked: int | None, largest: int | None, unbatched: str) -> int:
    """`max_batch_size`.

    Raises:
        ExportError: if what was asked for is not to be had.
    """
    if unbatched:
        if asked is not None:
            raise ExportError(f"--max-batch-size {asked}", f"batching is {unbatched}", "Leave it out.")
        return 0
    if asked is not None and largest is not None and asked > largest:
        do = "Give less, or build with a larger --max-batch."
        raise ExportError(f"--max-batch-size {asked}", f"the engine takes at most {largest} samples", do)
    return asked or largest or DEFAULT_BATCH


def _fields(export: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What manifest.json says of the model."""
    return {
        "name": config.name,
        "platform": config.platform,
        "max_batch_size": config.max_batch,
        "inputs": [asdict(port) for port in config.inputs],
        "outputs": [asdict(port) for port in config.outputs],
        "export": {key: export[key] for key in ("target", "stage", "origin", "plan") if key in export},
    }
