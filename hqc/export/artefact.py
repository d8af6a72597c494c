"""`export_program`: a Program becomes a verified ONNX folder.

NAME/model.onnx         the network; weights of at most 4 bits as INT4
NAME/model.onnx.data    the weights, where they are too large for the file itself
NAME/manifest.json      target, opset, origin, inputs, what verification measured, sha256 and size of every file
NAME/plan.json          the quantisation plan
NAME/pipeline/          what surrounds the denoiser, in diffusers layout (optional)
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hqc.errors import ExportError
from hqc.export.lowering import Tap
from hqc.export.model import DATA_FILE, EXTERNAL_DATA_BYTES, MODEL_FILE, onnx_from_program, save_model
from hqc.export.prepare import Target, prepare
from hqc.export.verification import Verification, verify_export
from hqc.memory import export_bytes, require_memory
from hqc.plan import QuantPlan
from hqc.program import Program
from hqc.storage import atomic_folder, copy_pipeline, write_manifest

__all__ = ["EXPORT_KIND", "OPSETS", "ExportReport", "export_program"]

EXPORT_KIND = "hqc-export"
OPSETS = range(21, 26)
"""INT4 came with opset 21; onnxruntime's own support sets the upper end."""


_LARGE_MODEL = 2**28
"""Bytes of weights beyond which verification makes do with few samples."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and measured."""

    folder: Path
    target: str
    opset: int
    nodes: int
    size_bytes: int
    seconds: float
    verification: Verification

    def __str__(self) -> str:
        head = (
            f"{self.folder}: {self.target}, opset {self.opset}, {self.nodes} nodes, "
            f"{self.size_bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        )
        return f"{head}\n{self.verification}"


def export_program(
    program: Program,
    target: Target,
    folder: Path,
    *,
    opset: int = 21,
    force: bool = False,
    float_program: Program | None = None,
    pipeline: Path | None = None,
    one_timestep: bool = False,
    verify_batch: int | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> ExportReport:
    """Lowers a program at any stage to ONNX, verifies the file, and only then puts the folder in its place.

    Args:
        program: captured (written in float), quantised, trained, or integer.
        target: `portable` (fake-quant semantics, any runtime) or `onnxruntime` (integer products).
        folder: written whole or not at all.
        opset: 21…25.
        force: replace an artefact that exists.
        float_program: the captured program, the measure of the quantisation error.
        pipeline: a diffusers-layout folder whose parts (all but the UNet) go with the export.
        one_timestep: the model takes one timestep a call, as every sampler gives it, and saves two passes over every
            activation; a batch of several timesteps is then run once for each.
        verify_batch: samples in the verification batch, whose timesteps differ; None: 8, or for models
            above 256 MiB 2, or 1 with one timestep.
        external_data_bytes: weights beyond this go into a file beside the model.

    Raises:
        ExportError: if an operator cannot be written, or verification is out of bounds.
        ArtefactError: if the folder exists or cannot be written.
    """
    if opset not in OPSETS:
        raise ExportError(f"opset {opset}", f"expected {OPSETS.start}…{OPSETS.stop - 1}", "Use 21 unless you must.")
    start = time.perf_counter()
    samples = verify_batch or _verification_batch(program, one_timestep=one_timestep)
    require_memory(f"exporting to {folder}", export_bytes(program, samples))
    with atomic_folder(folder, force=force) as temporary:
        path = temporary / MODEL_FILE
        taps, nodes, plan = _write_model(program, target, opset, temporary, one_timestep, external_data_bytes)
        verification = verify_export(path, taps, program, float_program=float_program, batch=samples)
        size = sum((temporary / name).stat().st_size for name in (MODEL_FILE, DATA_FILE) if (temporary / name).exists())
        seconds = round(time.perf_counter() - start, 3)
        report = ExportReport(folder, target, opset, nodes, size, seconds, verification)
        (temporary / "plan.json").write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
        if pipeline is not None:
            copy_pipeline(pipeline, temporary / "pipeline")
        write_manifest(temporary, EXPORT_KIND, _fields(program, report))
    return report


def _write_model(
    program: Program, target: Target, opset: int, folder: Path, one_timestep: bool, external_data_bytes: int
) -> tuple[Mapping[str, Tap], int, QuantPlan]:
    """Writes the model; what lowering has made in memory is gone when verification starts."""
    prepared = prepare(program, target)
    model, taps = onnx_from_program(prepared, target, opset, one_timestep=one_timestep)
    save_model(model, folder, external_data_bytes=external_data_bytes)
    return taps, len(model.graph), prepared.plan


def _verification_batch(program: Program, *, one_timestep: bool) -> int:
    if program.size_bytes() < _LARGE_MODEL:
        return 8
    return 1 if one_timestep else 2


def _fields(program: Program, report: ExportReport) -> dict[str, Any]:
    plan = program.plan
    return {
        "target": report.target,
        "opset": report.opset,
        "stage": str(program.stage),
        "origin": asdict(program.origin),
        "inputs": [asdict(spec) for spec in program.inputs],
        "plan": {
            "recipe": plan.recipe,
            "bits": plan.bits,
            "sites": len(plan.sites),
            "quantised": len(plan.quantised),
            "timesteps": list(plan.timesteps),
        },
        "verification": report.verification.to_dict(),
        "nodes": report.nodes,
        "size_bytes": report.size_bytes,
    }
