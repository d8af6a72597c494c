"""Float models quantised by the tools of other projects, each in a child: what it holds and prints stays there, and so
does its death. All are calibrated on the same inputs.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.bench.batches import Batch, write_batches
from hqc.evaluation.bench.contender import worker_environment
from hqc.evaluation.bench.machine import describe_machine, has_vnni
from hqc.evaluation.bench.models import Quantisation, calibration_of, recipe_of
from hqc.evaluation.workspace import Workspace, content
from hqc.export.model import DATA_FILE, MODEL_FILE
from hqc.runtimes.base import named_inputs
from hqc.runtimes.torch_runtime import TorchSession
from hqc.storage import atomic_folder, load_program, write_manifest

__all__ = ["NNCF", "ONNXRUNTIME", "Toolkit", "quantised_by", "run_tool"]

PEER_KIND = "hqc-bench-peer"


@dataclass(frozen=True)
class Toolkit:
    """A tool: the peer that it makes, the function that quantises, the module that calls it, and what it writes.

    files: the model first, then its weights, which may be missing. packages: whose versions decide what comes out.
    """

    peer: str
    function: str
    module: str
    files: tuple[str, ...]
    packages: tuple[str, ...]


ONNXRUNTIME = Toolkit(
    "onnxruntime-int8",
    "onnxruntime's quantize_static",
    "hqc.evaluation.bench.ort_int8",
    (MODEL_FILE, DATA_FILE),
    ("onnxruntime",),
)
NNCF = Toolkit(
    "openvino-int8",
    "nncf.quantize",
    "hqc.evaluation.bench.openvino_int8",
    ("model.xml", "model.bin"),
    ("nncf", "openvino"),
)


def quantised_by(
    tool: Toolkit, model: Path, captured: Path, wanted: Quantisation, space: Workspace
) -> tuple[Path, tuple[str, ...]]:
    """The quantised model's file, made once in the workspace, and what a reader of its figures should know.

    model: the float model as ONNX; captured: the program that it came from.
    """
    machine = describe_machine()
    weights = "full" if has_vnni(machine["isa"]) else "seven"
    depends: dict[str, Any] = {
        "program": content(captured),
        "calib_size": wanted.calib_size,
        "n_steps": wanted.n_steps,
        "weights": weights,
        "versions": {name: machine["versions"].get(name) for name in ("hqc", "torch", *tool.packages)},
    }

    def build(target: Path) -> None:
        with atomic_folder(target, force=True) as folder, tempfile.TemporaryDirectory(dir=space.folder) as scratch:
            batches = Path(scratch) / "calibration.npz"
            write_batches(batches, _float_trajectory(captured, wanted))
            notes = run_tool(tool, model, batches, Path(scratch), weights)
            for name in tool.files:
                if (Path(scratch) / name).exists():
                    (Path(scratch) / name).replace(folder / name)
            (folder / "notes.json").write_text(json.dumps(notes) + "\n", encoding="utf-8")
            write_manifest(folder, PEER_KIND, {})

    folder = space.make(tool.peer, PEER_KIND, depends, build)
    notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    return folder / tool.files[0], tuple(notes)


def run_tool(tool: Toolkit, model: Path, batches: Path, scratch: Path, weights: str) -> list[str]:
    """The tool in a child whose working folder is `scratch`; its notes.

    weights: full, or seven bits.

    Raises:
        EvaluationError: if it fails or dies.
    """
    arguments = [str(model.resolve()), str(batches.resolve()), str((scratch / tool.files[0]).resolve()), weights]
    done = subprocess.run(
        [sys.executable, "-m", tool.module, *arguments],
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
            tool.peer,
            f"{tool.function} {signal}: {lines[-1][:300] if lines else 'no message'}",
            f"Leave this peer out, or report it to {tool.packages[0]}.",
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
