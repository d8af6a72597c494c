"""Program -> complete ONNX model for one target, and its file on disk."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from hqc.export.files import DATA_FILE, MODEL_FILE
from hqc.export.functions import hadamard_function, register_schemas
from hqc.export.lowering import Tap
from hqc.export.onnxruntime import lower_onnxruntime
from hqc.export.portable import lower_portable
from hqc.export.prepare import Target
from hqc.export.tensorrt.lowering import lower_tensorrt
from hqc.export.tensorrt.options import TensorRtOptions
from hqc.program import Program

__all__ = ["DATA_FILE", "EXTERNAL_DATA_BYTES", "MODEL_FILE", "onnx_from_program", "save_model"]

EXTERNAL_DATA_BYTES = 2**28
"""Above this the weights go into a file of their own, which runtimes map; a message is read whole and ends at 2 GiB."""

_SMALL_TENSOR = 2**14


def onnx_from_program(
    prepared: Program,
    target: Target,
    opset: int,
    *,
    one_timestep: bool = False,
    functions: bool = False,
    tensorrt: TensorRtOptions | None = None,
) -> tuple[ir.Model, Mapping[str, Tap]]:
    """The model and, for every quantised site, where verification listens.

    one_timestep: the input `timestep` is [1] and serves the whole batch.
    functions: for `portable`, rotations as nodes of the model-local function `hqc::Hadamard`.
    tensorrt: the options of that target.
    Requires: a program as `prepare(program, target)` gives it.
    """
    register_schemas()
    if target == "tensorrt":
        options = tensorrt or TensorRtOptions()
        found, tensorrt_lowering = lower_tensorrt(prepared, opset, options, one_timestep=one_timestep)
        return found, tensorrt_lowering.taps
    if target == "onnxruntime":
        model, lowering = lower_onnxruntime(prepared, opset, one_timestep=one_timestep)
        return model, lowering.taps
    model, lowering = lower_portable(prepared, opset, one_timestep=one_timestep, functions=functions)
    if any(node.op_type == "Hadamard" for node in model.graph):
        function = hadamard_function(opset)
        model.functions[function.identifier()] = function
    return model, lowering.taps


def save_model(model: ir.Model, folder: Path, *, external_data_bytes: int = EXTERNAL_DATA_BYTES) -> Path:
    """Writes model.onnx, and model.onnx.data beside it where the weights are larger than the limit."""
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    path = folder / MODEL_FILE
    if weights > external_data_bytes:
        # Shape inference reads the small ones: split sizes, axes.
        ir.save(model, path, external_data=DATA_FILE, size_threshold_bytes=_SMALL_TENSOR)
    else:
        ir.save(model, path)
    return path
