"""What a model is compared with. A further peer is one entry in `PEERS`: how to build it, and which runtime runs it."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.bench.contender import worker_environment
from hqc.evaluation.bench.machine import describe_machine, has_vnni
from hqc.evaluation.bench.models import Quantisation, calibration_of, recipe_of
from hqc.evaluation.bench.ort_int8 import Batch, write_batches
from hqc.evaluation.workspace import Workspace, content
from hqc.export import EXPORT_KIND, export_program
from hqc.export.model import DATA_FILE, MODEL_FILE
from hqc.runtimes.base import named_inputs
from hqc.runtimes.torch_runtime import TorchSession
from hqc.storage import atomic_folder, load_program, write_manifest

__all__ = ["HQC", "ON_GPU", "PEERS", "USUAL_PEERS", "Built", "Peer", "compared", "find_peers", "size_bytes"]

HQC = "hqc"
"""The contender that is compared."""

ON_GPU = ("torch-cuda", "torch-fp16-compile", "torch-fp16-cudagraph")
"""Runtimes whose first calls compile."""

PEER_KIND = "hqc-bench-peer"


@dataclass(frozen=True)
class Built:
    """A contender on disk: the runtime that runs it, what that loads, and what a reader should know."""

    runtime: str
    model: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peer:
    """build(float program's folder, calibration, workspace) writes the peer's model; `what` says what it is."""

    what: str
    build: Callable[[Path, Quantisation, Workspace], Built]


def compared(folder: Path, runtime: str = "onnxruntime") -> Built:
    """The compared model itself: an export for onnxruntime, a Program for torch-cuda."""
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
    return sum(path.stat().st_size for path in names if path.is_file())


def _torch(captured: Path, wanted: Quantisation, space: Workspace) -> Built:
    return Built("torch", captured)


def _half_on_gpu(captured: Path, wanted: Quantisation, space: Workspace) -> Built:
    return Built("torch-fp16-cudagraph", captured)


def _compiled_on_gpu(captured: Path, wanted: Quantisation, space: Workspace) -> Built:
    return Built("torch-fp16-compile", captured)


def _onnxruntime_fp32(captured: Path, wanted: Quantisation, space: Workspace) -> Built:
    def build(target: Path) -> None:
        export_program(load_program(captured), "onnxruntime", target, force=True, verify_batch=2)

    return Built(
        "onnxruntime", space.make("onnxruntime-fp32", EXPORT_KIND, {"program": content(captured)}, build) / MODEL_FILE
    )


def _onnxruntime_int8(captured: Path, wanted: Quantisation, space: Workspace) -> Built:
    plain = _onnxruntime_fp32(captured, wanted, space)
    weights = "full" if has_vnni(describe_machine()["isa"]) else "seven"
    depends: dict[str, Any] = {
        "program": content(captured),
        "calib_size": wanted.calib_size,
        "n_steps": wanted.n_steps,
        "weights": weights,
        "versions": describe_machine()["versions"],
    }

    def build(target: Path) -> None:
        with atomic_folder(target, force=True) as folder, tempfile.TemporaryDirectory(dir=space.folder) as scratch:
            batches = Path(scratch) / "calibration.npz"
            write_batches(batches, _float_trajectory(captured, wanted))
            notes = _run_tool(plain.model, batches, Path(scratch), weights)
            for name in (MODEL_FILE, DATA_FILE):
                if (Path(scratch) / name).exists():
                    (Path(scratch) / name).replace(folder / name)
            (folder / "notes.json").write_text(json.dumps(notes) + "\n", encoding="utf-8")
            write_manifest(folder, PEER_KIND, {})

    folder = space.make("onnxruntime-int8", PEER_KIND, depends, build)
    notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    return Built("onnxruntime", folder / MODEL_FILE, tuple(notes))


def _run_tool(model: Path, batches: Path, scratch: Path, weights: str) -> list[str]:
    """onnxruntime's quantisation in a child: what it holds and prints stays there, and so does its death."""
    arguments = [str(model.resolve()), str(batches.resolve()), str((scratch / MODEL_FILE).resolve()), weights]
    done = subprocess.run(
        [sys.executable, "-m", "hqc.evaluation.bench.ort_int8", *arguments],
        cwd=scratch,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=worker_environment(),
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        signal = f"was killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise EvaluationError(
            "onnxruntime-int8",
            f"onnxruntime's quantize_static {signal}: {lines[-1][:300] if lines else 'no message'}",
            "Leave this peer out, or report it to onnxruntime.",
        )
    notes: list[str] = json.loads(done.stdout)["notes"]
    return notes


def _float_trajectory(captured: Path, wanted: Quantisation) -> list[Batch]:
    """The inputs of the float sampler's calls: those on which `hqc ptq` calibrates with equal settings."""
    from hqc.calibration import CalibrateActivations
    from hqc.sampling.task import trajectory

    program, recipe, batches = load_program(captured), recipe_of(wanted), list[Batch]()
    session = TorchSession(program)
    task, _ = calibration_of(program, captured)

    def record(sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        tensors = named_inputs(program.inputs, sample, timestep, *conditions)
        batches.append({name: tensor.numpy().copy() for name, tensor in tensors.items()})
        return session(sample, timestep, *conditions)

    sampler, calibration = recipe.sampler, recipe.step("calibrate_activations") or CalibrateActivations()
    options = (sampler.num_inference_steps, sampler.guidance_scale, sampler.eta, calibration.seed)
    for _ in trajectory(task, record, calibration.samples, *options):
        pass
    return batches


PEERS: Mapping[str, Peer] = {
    "onnxruntime-fp32": Peer("the float program in ONNX Runtime", _onnxruntime_fp32),
    "onnxruntime-int8": Peer("ONNX Runtime's own static quantisation (QDQ, u8 x s8)", _onnxruntime_int8),
    "torch": Peer("the float program in eager PyTorch", _torch),
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
    "torch-cuda": "torch-fp16-compile,torch-fp16-cudagraph",
}
"""What a runtime is compared with unless peers are named: the strongest there are."""
