"""Writes and verifies the model of a TensorRT export.

What is verified is a copy in which plugins, group norms and roundings are spelled out (`emulation`), and the file
itself, where ONNX Runtime runs it, against that copy. A copy in float32 is held to the bounds of every target. For a
file in half precision its float32 twin, the same graph in other types, is held to them; of its own copy the sites are
held to them, the network to the type's.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hqc.errors import ExportError
from hqc.export.lowering import Tap
from hqc.export.model import save_model
from hqc.export.prepare import prepare
from hqc.export.tensorrt.emulation import write_emulated
from hqc.export.tensorrt.float_activations import bypass_activation_quantisers, weight_only_sites
from hqc.export.tensorrt.forms import LayerForm, layer_forms
from hqc.export.tensorrt.lowering import lower_tensorrt
from hqc.export.tensorrt.options import TensorRtOptions
from hqc.export.tensorrt.surgery import finish
from hqc.export.verification import (
    FORCED_BOUND,
    FREE_BOUND,
    LARGE_MODEL,
    ROUNDINGS,
    Verification,
    check_onnx,
    file_output,
    verify_export,
)
from hqc.passes.float_attention import with_float_attention
from hqc.plan import QuantPlan
from hqc.program import Program

__all__ = ["TensorRtModel", "reference_program", "verify_tensorrt", "write_tensorrt"]


_TWIN = "float32_twin"


@dataclass(frozen=True)
class TensorRtModel:
    """A written model: its file, where verification listens, its nodes, the form of every layer, its float32 twin."""

    path: Path
    taps: Mapping[str, Tap]
    nodes: int
    forms: tuple[LayerForm, ...]
    plan: QuantPlan
    twin: "TensorRtModel | None" = None


def write_tensorrt(
    program: Program,
    folder: Path,
    options: TensorRtOptions,
    *,
    opset: int,
    one_timestep: bool,
    external_data_bytes: int,
) -> TensorRtModel:
    """Writes model.onnx, model.onnx.data beside it where that is large, and the twin in a folder of its own.

    What lowering has made in memory is gone afterwards.
    Raises:
        ExportError: for what the target cannot express.
    """
    prepared = prepare(program, "tensorrt", weight_only=options.weight_only)

    forms = layer_forms(prepared, options)

    def write(place: Path, chosen: TensorRtOptions) -> TensorRtModel:
        model, lowering = lower_tensorrt(prepared, opset, chosen, one_timestep=one_timestep, forms=forms)
        path = save_model(model, place, external_data_bytes=external_data_bytes)
        return TensorRtModel(path, lowering.taps, finish(path), tuple(forms.values()), prepared.plan)

    written = write(folder, options)
    if options.dtype == "fp32":
        return written
    (folder / _TWIN).mkdir()
    return replace(written, twin=write(folder / _TWIN, replace(options, dtype="fp32")))


def reference_program(program: Program, options: TensorRtOptions) -> Program:
    """The program that an export is held to: attention in float, and activations where the options ask for it."""
    program = with_float_attention(program)
    if not options.weight_only:
        return program
    return bypass_activation_quantisers(program, weight_only_sites(program, options.weight_only))


def verify_tensorrt(
    written: TensorRtModel,
    reference: Program,
    options: TensorRtOptions,
    *,
    float_program: Program | None,
    batch: int,
) -> tuple[Verification, Verification | None]:
    """What was measured of the file, and of its float32 twin, which is deleted.

    Raises:
        ExportError: naming everything that is out of bounds.
    """
    exact = None
    if written.twin is not None:
        exact, _ = verify_tensorrt(
            written.twin, reference, replace(options, dtype="fp32"), float_program=float_program, batch=batch
        )
        shutil.rmtree(written.twin.path.parent)
    check_onnx(written.path)
    emulated = write_emulated(written.path, int(options.onnx_type))
    # The bodies of plugins unpack and rotate weights: folding those of a large model takes six times their float size.
    optimised = options.plugins == "none" or reference.size_bytes() < LARGE_MODEL
    expected = file_output(emulated, reference, batch, optimised=optimised)
    if not bool(expected.isfinite().all()):
        raise ExportError(
            f"dtype {options.dtype}",
            "its range is left on the verification inputs",
            "Export with --dtype bf16 or fp32.",
        )
    own = verify_export(
        emulated,
        written.taps,
        reference,
        float_program=float_program,
        batch=batch,
        rounding=options.rounding,
        optimised=optimised,
        output=expected,
    )
    emulated.unlink()
    if options.dtype != "bf16":
        _compare(file_output(written.path, reference, batch, optimised=optimised), expected, own, options)
    return own, exact


def _compare(found: Tensor, expected: Tensor, own: Verification, options: TensorRtOptions) -> None:
    """The file against the copy that was verified; where ONNX Runtime rounds otherwise, codes may part.

    Raises:
        ExportError: if they differ by more than two draws of the quantisation error.
    """
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    bound = max(FREE_BOUND * (own.network.quantisation_error or 0.0), ROUNDINGS * options.rounding, FORCED_BOUND)
    if not error <= bound:
        raise ExportError(
            "export verification",
            f"the file differs from the copy that was verified by {error:.1e}; at most {bound:.0e}",
            "Nothing was written. Report a bug.",
        )
