"""The plugins as quickly deployable plugins: TensorRT 10.9 and later puts their PTX into the engine.

Importing this registers them in TensorRT's registry: import it once a process, through `register`.

What TensorRT's Python code asks for, 10.9 to 11.4, and where it is met:

- Annotations are looked at as objects. No `from __future__ import annotations` here: they would be text, and
  `register` would refuse every function.
- Numbers arrive as arrays of one element (`Ints`). With NumPy 2.4 or newer, TensorRT 10 fails to make an `int` of what
  the parser hands it ("only 0-dimensional arrays can be converted to Python scalars"); arrays it passes on, in 11 too.
- No text attributes: text from an ONNX file arrives with a NUL at its end.
- No default values, tensors first, and none is named outputs, stream or tactic.
- `aot_impl` names every attribute: a part of them would be accepted, but all are passed, by position.
- `aot_impl` needs its return annotation of four parts, although the documentation calls annotations optional.
- Kernels take input pointers, int32 values, output pointers, in this order, and no floating-point values: scales are
  tensors. Triton's two scratch pointers at the end are not declared; TensorRT passes null for what is missing.
- The type of an output comes from `register` and is set explicitly: networks are strongly typed.
- Inputs are never shape tensors, which these plugins may not have.
- `is_constant` and `constant_value` of expressions are not asked: in 11.2 they read a field that is not there. Sizes
  that must be numbers come from `desc.shape`.
- There is no `impl`, so that PREFER_AOT_PYTHON_PLUGINS need not be set, and nothing of Python runs with the engine.
- The id in a timing cache is empty for these plugins: different PTX of one name may be taken for timed already. A
  timing cache therefore belongs to one digest of the plugins.
- Dynamic shared memory stays within 48 KiB, what a launch may have without asking the driver for more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorrt as trt
import tensorrt.plugin as trtp

from .current import CURRENT
from .nodes import OPS, Choice
from .problems import PluginError
from .trt_types import DTYPES, NAMES, NAMESPACE

__all__: list[str] = []

Ints = npt.NDArray[np.int32]
Aot = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]

_TYPES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "int8": "INT8"}
"""As combinations are written."""


# ---- HadamardQuantize ----------------------------------------------------------------------------------------------


def _describe_hadamard(
    x: trtp.TensorDesc,
    inv_scale: trtp.TensorDesc,
    block: Ints,
    low: Ints,
    high: Ints,
    channel_axis: Ints,
    regular: Ints,
) -> trtp.TensorDesc:
    codes = x.like()
    codes.dtype = trt.int8
    return codes


def _tune_hadamard(
    x: trtp.TensorDesc,
    inv_scale: trtp.TensorDesc,
    block: Ints,
    low: Ints,
    high: Ints,
    channel_axis: Ints,
    regular: Ints,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    return _tune("HadamardQuantize", (x, inv_scale), (block, low, high, channel_axis, regular))


def _kernel_hadamard(
    x: trtp.TensorDesc,
    inv_scale: trtp.TensorDesc,
    block: Ints,
    low: Ints,
    high: Ints,
    channel_axis: Ints,
    regular: Ints,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Aot:
    return _kernel("HadamardQuantize", (x, inv_scale), (block, low, high, channel_axis, regular), outputs, tactic)


# ---- HadamardQuantizeBounded ---------------------------------------------------------------------------------------


def _describe_bounded(
    x: trtp.TensorDesc, step: trtp.TensorDesc, block: Ints, channel_axis: Ints, regular: Ints
) -> trtp.TensorDesc:
    codes = x.like()
    codes.dtype = trt.int8
    return codes


def _tune_bounded(
    x: trtp.TensorDesc,
    step: trtp.TensorDesc,
    block: Ints,
    channel_axis: Ints,
    regular: Ints,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    return _tune("HadamardQuantizeBounded", (x, step), (block, channel_axis, regular))


def _kernel_bounded(
    x: trtp.TensorDesc,
    step: trtp.TensorDesc,
    block: Ints,
    channel_axis: Ints,
    regular: Ints,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Aot:
    return _kernel("HadamardQuantizeBounded", (x, step), (block, channel_axis, regular), outputs, tactic)


# ---- Int4Linear ----------------------------------------------------------------------------------------------------


def _describe_linear(
    q: trtp.TensorDesc,
    weight: trtp.TensorDesc,
    scale_w: trtp.TensorDesc,
    scale_a: trtp.TensorDesc,
    bias: trtp.TensorDesc,
    block: Ints,
    out_type: Ints,
    regular: Ints,
) -> trtp.TensorDesc:
    return _describe("Int4Linear", (q, weight), (block, out_type, regular))


def _tune_linear(
    q: trtp.TensorDesc,
    weight: trtp.TensorDesc,
    scale_w: trtp.TensorDesc,
    scale_a: trtp.TensorDesc,
    bias: trtp.TensorDesc,
    block: Ints,
    out_type: Ints,
    regular: Ints,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    return _tune("Int4Linear", (q, weight, scale_w, scale_a, bias), (block, out_type, regular))


def _kernel_linear(
    q: trtp.TensorDesc,
    weight: trtp.TensorDesc,
    scale_w: trtp.TensorDesc,
    scale_a: trtp.TensorDesc,
    bias: trtp.TensorDesc,
    block: Ints,
    out_type: Ints,
    regular: Ints,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Aot:
    return _kernel("Int4Linear", (q, weight, scale_w, scale_a, bias), (block, out_type, regular), outputs, tactic)


# ---- Int4Conv ------------------------------------------------------------------------------------------------------


def _describe_conv(
    q: trtp.TensorDesc,
    weight: trtp.TensorDesc,
    scale_w: trtp.TensorDesc,
    scale_a: trtp.TensorDesc,
    bias: trtp.TensorDesc,
    block: Ints,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    out_type: Ints,
    regular: Ints,
) -> trtp.TensorDesc:
    return _describe("Int4Conv", (q, weight), (block, kernel, stride, padding, out_type, regular))


def _tune_conv(
    q: trtp.TensorDesc,
    weight: trtp.TensorDesc,
    scale_w: trtp.TensorDesc,
    scale_a: trtp.TensorDesc,
    bias: trtp.TensorDesc,
    block: Ints,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    out_type: Ints,
    regular: Ints,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    attributes = (block, kernel, stride, padding, out_type, regular)
    return _tune("Int4Conv", (q, weight, scale_w, scale_a, bias), attributes)


def _kernel_conv(
    q: trtp.TensorDesc,
    weight: trtp.TensorDesc,
    scale_w: trtp.TensorDesc,
    scale_a: trtp.TensorDesc,
    bias: trtp.TensorDesc,
    block: Ints,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    out_type: Ints,
    regular: Ints,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Aot:
    attributes = (block, kernel, stride, padding, out_type, regular)
    return _kernel("Int4Conv", (q, weight, scale_w, scale_a, bias), attributes, outputs, tactic)


# ---- what all share ------------------------------------------------------------------------------------------------


def _numbers(op: str, values: Sequence[Ints]) -> Mapping[str, int]:
    """Attributes by name, as whole numbers."""
    return {name: int(value[0]) for name, value in zip(OPS[op].attributes, values, strict=True)}


def _describe(op: str, tensors: Sequence[Any], attributes: Sequence[Ints]) -> Any:
    shape, dtype = OPS[op].output([tensor.shape_expr for tensor in tensors], _numbers(op, attributes))
    return trtp.from_shape_expr(shape, DTYPES[dtype])


def _choices(op: str, tensors: Sequence[Any], attributes: Sequence[Ints]) -> tuple[Choice, ...]:
    dims = [tuple(int(size) for size in tensor.shape) for tensor in tensors]
    return OPS[op].choices(dims, NAMES[tensors[0].dtype.name], _numbers(op, attributes))


def _tune(op: str, tensors: Sequence[Any], attributes: Sequence[Ints]) -> list[Any]:
    """Every way to run the node, each with all its tactics."""
    return [
        trtp.AutoTuneCombination(
            ", ".join(_TYPES[name] for name in choice.types),
            ", ".join(choice.formats),
            list(range(1, len(CURRENT.tactics(choice.variant.key)) + 1)),
        )
        for choice in _choices(op, tensors, attributes)
    ]


def _kernel(op: str, tensors: Sequence[Any], attributes: Sequence[Ints], outputs: Sequence[Any], tactic: int) -> Aot:
    """PTX, entry point, launch and int32 arguments of the tactic for the formats that TensorRT settled on."""
    formats = tuple(tensor.format.name for tensor in (*tensors, *outputs))
    choice = next((c for c in _choices(op, tensors, attributes) if c.formats == formats), None)
    if choice is None:
        found = f"TensorRT asks for formats {', '.join(formats)}, which were not offered"
        raise PluginError(op, found, "Report a bug.")
    kernel = CURRENT.tactics(choice.variant.key)[tactic - 1]
    launch = choice.variant.launch(tensors[0].shape_expr, kernel.tile, _ceil_div)
    settings = trtp.KernelLaunchParams()
    settings.grid_x, settings.grid_y, settings.grid_z = launch.grid
    settings.block_x = kernel.threads
    settings.shared_mem = kernel.shared_bytes
    integers = trtp.SymIntExprs(len(launch.integers))
    for index, value in enumerate(launch.integers):
        integers[index] = trtp.SymInt32(value)
    return kernel.entry.encode(), kernel.ptx, settings, integers


def _ceil_div(size: Any, divisor: int) -> Any:
    """`cdiv` refuses two numbers; an image's pixels may be one."""
    return -(-size // divisor) if isinstance(size, int) else trtp.cdiv(size, divisor)


for _name, _functions in {
    "HadamardQuantize": (_describe_hadamard, _tune_hadamard, _kernel_hadamard),
    "HadamardQuantizeBounded": (_describe_bounded, _tune_bounded, _kernel_bounded),
    "Int4Linear": (_describe_linear, _tune_linear, _kernel_linear),
    "Int4Conv": (_describe_conv, _tune_conv, _kernel_conv),
}.items():
    for _decorate, _function in zip((trtp.register, trtp.autotune, trtp.aot_impl), _functions, strict=True):
        _decorate(f"{NAMESPACE}::{_name}")(_function)
