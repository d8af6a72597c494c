"""`export_program`: a Program becomes a verified ONNX folder.

NAME/model.onnx         the network; weights whose codes fit 4 bits as INT4
NAME/model.onnx.data    the weights, where they are too large for the file itself
NAME/config.json        with names other than hqc's: the denoiser's configuration
NAME/manifest.json      target, opset, origin, inputs, what verification measured, sha256 and size of every file
NAME/plan.json          the quantisation plan
NAME/report.json        for TensorRT: the form of every layer and why, the options, what the hardware does
NAME/plugins/           for TensorRT with plugins: their kernels for every architecture; see `hqc.plugins.writing`
NAME/pipeline/          what surrounds the denoiser, in diffusers layout (optional)
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hqc.errors import ExportError, OptionError
from hqc.export.attention_notes import attention_note
from hqc.export.files import CONFIG_FILE
from hqc.export.interface import Interface, Names, interface_for, rename_ports
from hqc.export.lowering import Tap
from hqc.export.model import DATA_FILE, EXTERNAL_DATA_BYTES, MODEL_FILE, onnx_from_program, save_model
from hqc.export.prepare import Target, prepare
from hqc.export.tensorrt.forms import LayerForm
from hqc.export.tensorrt.options import TensorRtOptions
from hqc.export.tensorrt.report import form_counts, write_report
from hqc.export.tensorrt.surgery import graphsurgeon
from hqc.export.tensorrt.writing import reference_program, verify_tensorrt, write_tensorrt
from hqc.export.verification import LARGE_MODEL, Verification, check_onnx, verify_export
from hqc.kernels.guards import require_triton
from hqc.memory import export_bytes, require_memory
from hqc.paths import StrPath
from hqc.plan import QuantPlan
from hqc.plugins.writing import OnKernel, write_plugins
from hqc.program import Program, Stage
from hqc.stages import doing
from hqc.storage import atomic_folder, copy_pipeline, write_manifest

__all__ = ["EXPORT_KIND", "OPSETS", "ExportReport", "export_program"]

EXPORT_KIND = "hqc-export"
OPSETS = range(21, 26)
"""INT4 came with opset 21; onnxruntime's own support sets the upper end."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and measured.

    For TensorRT: `options`, the form of every layer, and what was measured of the float32 `twin`. `functions`: whether
    rotations are nodes of a function in the file. attention: how the target runs attention that is quantised.
    """

    folder: Path
    target: str
    opset: int
    nodes: int
    size_bytes: int
    seconds: float
    verification: Verification
    options: TensorRtOptions | None = None
    layers: tuple[LayerForm, ...] = ()
    twin: Verification | None = None
    functions: bool = False
    attention: str = ""

    def __str__(self) -> str:
        head = (
            f"{self.folder}: {self.target}, opset {self.opset}, {self.nodes} nodes, "
            f"{self.size_bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        )
        lines = [head]
        if self.options is not None:
            lines.append(f"layers   {form_counts(self.layers)}; {self.options.dtype}, plugins {self.options.plugins}")
        if self.attention:
            lines.append(f"attention {self.attention}")
        if self.twin is not None:
            lines.append(f"twin     float32, network with equal codes {self.twin.network.forced_error:.1e}")
        return "\n".join((*lines, str(self.verification)))


def _require_same_model(program: Program, float_program: Program) -> None:
    """Refuses a measure of the quantisation error that is not the captured program of the same model."""
    if program.stage == Stage.CAPTURED:
        raise OptionError("--against", "the program is captured: it has no quantisation error", "Leave it out.")
    shapes = [{spec.name: spec.shape for spec in p.inputs} for p in (program, float_program)]
    if shapes[0] != shapes[1]:
        mine, other = (", ".join(f"{name} {list(shape)}" for name, shape in found.items()) for found in shapes)
        raise ExportError("--against", f"takes {other}; the program takes {mine}", "Give the Program it was made from.")
    if float_program.stage != Stage.CAPTURED:
        raise ExportError(
            "--against", f"is {float_program.stage}; expected a captured Program", "Give what trace wrote."
        )


def export_program(
    program: Program,
    target: Target,
    folder: StrPath,
    *,
    opset: int = 21,
    force: bool = False,
    float_program: Program | None = None,
    pipeline: StrPath | None = None,
    one_timestep: bool = False,
    functions: bool = False,
    names: Names = "hqc",
    verify_batch: int | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
    tensorrt: TensorRtOptions | None = None,
    on_kernel: OnKernel | None = None,
) -> ExportReport:
    """Lowers a program at any stage to ONNX, verifies the file, and only then puts the folder in its place.

    Args:
        program: captured (written in float), quantised, trained, or integer.
        target: `portable` (fake-quant semantics, any runtime), `onnxruntime` (integer products) or `tensorrt`.
        folder: written whole or not at all.
        opset: 21…25.
        force: replace an artefact that exists.
        float_program: the captured program, the measure of the quantisation error.
        pipeline: a diffusers-layout folder whose parts (all but the UNet) go with the export.
        one_timestep: the model takes one timestep a call, as every sampler gives it, and saves two passes over every
            activation; a batch of several timesteps is then run once for each.
        functions: for `portable`, a rotation is one node `hqc::Hadamard` with its body in the file, for tools that have
            a kernel of their own for it; without it the file holds standard operators only.
        names: what the file's inputs and output are called, as hqc calls them or as `optimum` does, which also wants a
            `config.json` beside the model. Every hqc runtime reads either.
        verify_batch: samples in the verification batch, whose timesteps differ; None: 8, or for models
            above 256 MiB 2, or 1 with one timestep.
        external_data_bytes: weights beyond this go into a file beside the model.
        tensorrt: the options of that target; None: fp16 activations, standard operators.
        on_kernel: told of every kernel of a plugin before it is compiled.

    Raises:
        ExportError: if an operator cannot be written, no kernel takes a node, or verification is out of bounds.
        RuntimeMissingError: if onnx-graphsurgeon, or for plugins triton, is not installed.
        ArtefactError: if the folder exists or cannot be written.
    """
    folder, pipeline = Path(folder), None if pipeline is None else Path(pipeline)
    if opset not in OPSETS:
        raise ExportError(f"opset {opset}", f"expected {OPSETS.start}…{OPSETS.stop - 1}", "Use 21 unless you must.")
    if target == "tensorrt" and (attached := program.attached_styles):
        found = f"has no inputs for LoRAs, and {attached[0]} is attached"
        raise ExportError(f"target {target}", found, "Merge it at `hqc trace --lora`, or use another target.")
    if tensorrt is not None and target != "tensorrt":
        raise ExportError(f"target {target}", "takes no options of TensorRT", "Use target tensorrt, or leave them out.")
    if functions and target != "portable":
        raise ExportError(f"target {target}", "takes no functions", "Leave --functions out, or use target portable.")
    if one_timestep and not program.has_timestep:
        raise ExportError("--one-timestep", "the program has no timestep", "Leave it out.")
    interface = interface_for(names, program.inputs, program.origin.unet_config, program.origin.kind)
    if names != "hqc" and target == "tensorrt":
        raise ExportError(f"target {target}", f"has no names of {names}", "Leave --names out, or use another target.")
    if float_program is not None:
        _require_same_model(program, float_program)
    if target == "tensorrt":
        graphsurgeon()
        if _has_kernels(tensorrt):
            require_triton("--plugins qdp")
    start = time.perf_counter()
    samples = verify_batch or _verification_batch(program, one_timestep=one_timestep)
    require_memory(f"exporting to {folder}", export_bytes(program, samples))
    settings = _Settings(opset, one_timestep, functions, external_data_bytes, samples, float_program, on_kernel)
    with atomic_folder(folder, force=force) as temporary:
        if target == "tensorrt":
            made = _make_tensorrt(program, temporary, settings, tensorrt or TensorRtOptions())
        else:
            made = _make(program, target, temporary, settings)
            _rename(temporary, interface, program)
        size = sum((temporary / name).stat().st_size for name in (MODEL_FILE, DATA_FILE) if (temporary / name).exists())
        seconds = round(time.perf_counter() - start, 3)
        report = ExportReport(
            folder,
            target,
            opset,
            made.nodes,
            size,
            seconds,
            made.verification,
            made.options,
            made.layers,
            made.twin,
            functions,
            attention_note(program, target),
        )
        (temporary / "plan.json").write_text(json.dumps(made.plan.to_dict(), indent=1) + "\n", encoding="utf-8")
        if report.options is not None:
            write_report(temporary, opset, report.options, report.layers, report.verification, report.twin)
        if pipeline is not None:
            copy_pipeline(pipeline, temporary / "pipeline")
        write_manifest(temporary, EXPORT_KIND, {**_fields(program, report), "names": interface.to_dict()})
    return report


def _rename(folder: Path, interface: Interface, program: Program) -> None:
    """Gives the verified file its names, and what opens it by them the denoiser's configuration."""
    if not interface.renamings():
        return
    rename_ports(folder / MODEL_FILE, interface)
    check_onnx(folder / MODEL_FILE)
    config = json.dumps(dict(program.origin.unet_config), indent=1) + "\n"
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")


@dataclass(frozen=True)
class _Settings:
    """What every target is told besides the program."""

    opset: int
    one_timestep: bool
    functions: bool
    external_data_bytes: int
    samples: int
    float_program: Program | None
    on_kernel: OnKernel | None


@dataclass(frozen=True)
class _Made:
    """A model that has been written and verified."""

    nodes: int
    plan: QuantPlan
    verification: Verification
    options: TensorRtOptions | None = None
    layers: tuple[LayerForm, ...] = ()
    twin: Verification | None = None


def _make(program: Program, target: Target, folder: Path, settings: _Settings) -> _Made:
    with doing(f"lowering for {target}"):
        taps, nodes, plan = _write_model(program, target, folder, settings)
    with doing("verifying what was written"):
        found = verify_export(
            folder / MODEL_FILE, taps, program, float_program=settings.float_program, batch=settings.samples
        )
    return _Made(nodes, plan, found)


def _write_model(
    program: Program, target: Target, folder: Path, settings: _Settings
) -> tuple[Mapping[str, Tap], int, QuantPlan]:
    """Writes the model; what lowering has made in memory is gone when verification starts."""
    prepared = prepare(program, target)
    model, taps = onnx_from_program(
        prepared, target, settings.opset, one_timestep=settings.one_timestep, functions=settings.functions
    )
    save_model(model, folder, external_data_bytes=settings.external_data_bytes)
    return taps, len(model.graph), prepared.plan


def _make_tensorrt(program: Program, folder: Path, settings: _Settings, options: TensorRtOptions) -> _Made:
    with doing("lowering for tensorrt"):
        written = write_tensorrt(
            program,
            folder,
            options,
            opset=settings.opset,
            one_timestep=settings.one_timestep,
            external_data_bytes=settings.external_data_bytes,
        )
    if _has_kernels(options):
        write_plugins(folder, written.path, options.plugin_archs, on_kernel=settings.on_kernel)
    reference = reference_program(program, options)
    with doing("verifying what was written"):
        found, twin = verify_tensorrt(
            written, reference, options, float_program=settings.float_program, batch=settings.samples
        )
    return _Made(written.nodes, written.plan, found, options, written.forms, twin)


def _has_kernels(options: TensorRtOptions | None) -> bool:
    return options is not None and options.plugins == "qdp" and bool(options.plugin_archs)


def _verification_batch(program: Program, *, one_timestep: bool) -> int:
    if program.size_bytes() < LARGE_MODEL:
        return 8
    return 1 if one_timestep else 2


def _fields(program: Program, report: ExportReport) -> dict[str, Any]:
    plan = program.plan
    own = {} if report.options is None else {"tensorrt": asdict(report.options)}
    return {
        "target": report.target,
        "opset": report.opset,
        "functions": report.functions,
        **({"attention": report.attention} if report.attention else {}),
        **own,
        "stage": str(program.stage),
        "origin": asdict(program.origin),
        "inputs": [asdict(spec) for spec in program.inputs],
        **({"loras": [style.to_dict() for style in program.styles]} if program.styles else {}),
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
