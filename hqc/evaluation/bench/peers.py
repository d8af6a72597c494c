"""What a model is compared with. A further peer is one entry in `PEERS`: how to build it, and which runtime runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hqc.errors import EvaluationError
from hqc.evaluation.bench.models import Models, Quantisation, exported
from hqc.evaluation.bench.requirements import require_cpp_compiler, require_openvino
from hqc.evaluation.bench.toolkits import NNCF, ONNXRUNTIME, quantised_by
from hqc.evaluation.workspace import Workspace, content
from hqc.export import EXPORT_KIND, Target, export_program
from hqc.export.model import MODEL_FILE
from hqc.storage import load_program

__all__ = [
    "COMPILING",
    "HQC",
    "ON_GPU",
    "PEERS",
    "USUAL_PEERS",
    "Built",
    "Peer",
    "compared",
    "find_peers",
    "size_bytes",
]

HQC = "hqc"
"""The contender that is compared."""

ON_GPU = ("torch-cuda", "torch-fp16-compile", "torch-fp16-cudagraph")
"""Runtimes on a GPU."""

COMPILING = (*ON_GPU, "torch-compile")
"""Runtimes whose first calls compile."""


@dataclass(frozen=True)
class Built:
    """A contender on disk: the runtime that runs it, what that loads, and what a reader should know."""

    runtime: str
    model: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peer:
    """build(models, calibration, workspace) writes the peer's model; `what` says what it is.

    require: raises where this machine cannot have it, before long work starts.
    """

    what: str
    build: Callable[[Models, Quantisation, Workspace], Built]
    require: Callable[[], None] = lambda: None


def compared(folder: Path, runtime: str = "onnxruntime") -> Built:
    """The compared model itself: an export for onnxruntime, a Program for torch-int8 and torch-cuda."""
    return Built(runtime, folder / MODEL_FILE if runtime == "onnxruntime" else folder)


def find_peers(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, each once.

    Raises:
        EvaluationError: for a name that is not among `PEERS`, or none at all.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise EvaluationError("--against", "names no peer", f"There are {', '.join(PEERS)}.")
    for name in names:
        if name not in PEERS:
            raise EvaluationError(f"peer {name!r}", "unknown", f"There are {', '.join(PEERS)}.")
    return names


def size_bytes(built: Built) -> int:
    """Bytes on disk of what the runtime reads: graph and weights."""
    names = [built.model / "graph.json", built.model / "weights.safetensors"]
    if built.runtime == "onnxruntime":
        names = [built.model, built.model.with_name(built.model.name + ".data")]
    if built.runtime == "openvino":
        names = [built.model, built.model.with_suffix(".bin")]
    return sum(path.stat().st_size for path in names if path.is_file())


def _torch(models: Models, wanted: Quantisation, space: Workspace) -> Built:
    return Built("torch", models.float_program)


def _half_on_gpu(models: Models, wanted: Quantisation, space: Workspace) -> Built:
    return Built("torch-fp16-cudagraph", models.float_program)


def _compiled_on_gpu(models: Models, wanted: Quantisation, space: Workspace) -> Built:
    return Built("torch-fp16-compile", models.float_program)


def _onnxruntime_fp32(models: Models, wanted: Quantisation, space: Workspace) -> Built:
    return Built("onnxruntime", _float_export(models.float_program, "onnxruntime", space))


def _float_export(program: Path, target: Target, space: Workspace) -> Path:
    """The float program's file for a target."""

    def build(folder: Path) -> None:
        export_program(load_program(program), target, folder, force=True, verify_batch=2)

    return space.make(f"{target}-fp32", EXPORT_KIND, {"program": content(program)}, build) / MODEL_FILE


def _onnxruntime_int8(models: Models, wanted: Quantisation, space: Workspace) -> Built:
    plain = _float_export(models.float_program, "onnxruntime", space)
    model, notes = quantised_by(ONNXRUNTIME, plain, models.float_program, wanted, space)
    return Built("onnxruntime", model, notes)


def _openvino_int8(models: Models, wanted: Quantisation, space: Workspace) -> Built:
    """From the target `portable`, whose standard operators OpenVINO reads."""
    plain = _float_export(models.float_program, "portable", space)
    model, notes = quantised_by(NNCF, plain, models.float_program, wanted, space)
    return Built("openvino", model, notes)


def _hqc_onnxruntime(models: Models, wanted: Quantisation, space: Workspace) -> Built:
    """The compared program in the other runtime of CPUs."""
    if models.quantised is None or (models.export / MODEL_FILE).is_file():
        found = "an export in ONNX Runtime is what is timed already"
        raise EvaluationError("peer hqc-onnxruntime", found, "Give --runtime torch-int8, or leave the peer out.")
    return Built("onnxruntime", exported(models.quantised, space) / MODEL_FILE)


def _torch_compile(models: Models, wanted: Quantisation, space: Workspace) -> Built:
    return Built("torch-compile", models.float_program)


PEERS: Mapping[str, Peer] = {
    "onnxruntime-fp32": Peer("the float program in ONNX Runtime", _onnxruntime_fp32),
    "onnxruntime-int8": Peer("ONNX Runtime's own static quantisation (QDQ, u8 x s8)", _onnxruntime_int8),
    "torch": Peer("the float program in eager PyTorch", _torch),
    "torch-compile": Peer(
        "the float program compiled by torch.compile for the CPU, its weights frozen and packed",
        _torch_compile,
        require_cpp_compiler,
    ),
    "openvino-int8": Peer("NNCF's post-training quantisation (u8 x s8) in OpenVINO", _openvino_int8, require_openvino),
    "hqc-onnxruntime": Peer("the same quantised program, exported to ONNX Runtime", _hqc_onnxruntime),
    "torch-fp16-compile": Peer(
        "the float program on a GPU in float16, channels-last, torch.compile, one CUDA graph a batch size",
        _compiled_on_gpu,
    ),
    "torch-fp16-cudagraph": Peer(
        "the float program on a GPU in float16, channels-last, one CUDA graph a batch size", _half_on_gpu
    ),
}
"""Every peer by its name."""

USUAL_PEERS: Mapping[str, str] = {
    "onnxruntime": "onnxruntime-fp32",
    "torch-int8": "onnxruntime-fp32",
    "torch-cuda": "torch-fp16-compile,torch-fp16-cudagraph",
}
"""What a runtime is compared with unless peers are named: the strongest there are."""
