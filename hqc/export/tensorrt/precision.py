"""Strong typing: which nodes compute in float32, which in the activations' dtype, and the casts between them.

A graph is lowered in float32; here every node gets its type.

    full        the sites (smoothing, rotation, scales, quantiser, product, bias), RMS normalisation, sums,
                exponentials, what a sine or cosine is computed from, and what comes after the timestep up to the
                first layer
    activation  the rest: convolutions and linear layers left float, attention, additions, SiLU, …; group and layer
                normalisation, whose operators take their statistics in float32 by an attribute
    plugin      activations in and out, scales in float32

Why the sites: a float16 value is exact in float32 (and in TF32), its sum with b signs is not exact in float16, and a
relative error of 2^-11 there moves an 8-bit level of 127 by 0.06 of a step, enough to flip one code in twenty. Casts
cost nothing where they are fused into the neighbouring kernel. Why sums and exponentials: they leave float16 at 65 504.
"""

from enum import Enum
from functools import lru_cache

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import fx

from hqc.bounds import QUANTISERS
from hqc.errors import ExportError
from hqc.export.builder import GraphBuilder, typed
from hqc.export.tensorrt.functions import ROTATING_NODES
from hqc.program import Program, aten, is_op

__all__ = ["PRECISION", "Precision", "full_precision_nodes", "set_precision"]

ops = torch.ops.hqc
FLOAT = ir.DataType.FLOAT
PRECISION = "precision"
"""The key in a node's `meta`."""

_NUMPY = {ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16}
_ALWAYS_FLOAT = {("Resize", 1), ("Resize", 2)}


class Precision(Enum):
    """How a node computes."""

    FULL = "full"
    ACTIVATION = "activation"
    PLUGIN = "plugin"


_FULL_TARGETS = (
    *(ops.nearest_timestep.default, ops.hadamard.default, *QUANTISERS, ops.rescale.default),
    *(aten.rms_norm.default, aten.mean.dim, aten.sum.dim_IntList),
    *(aten.exp.default, aten.log.default, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar),
    *(aten.softplus.default, aten.mish.default, aten.gelu.default, aten.rsqrt.default, aten.reciprocal.default),
)
_WAVES = (aten.sin.default, aten.cos.default)
_LAYERS = (aten.linear.default, aten.conv2d.default, aten.conv1d.default, ops.rescale.default)


def full_precision_nodes(program: Program) -> frozenset[fx.Node]:
    """The fx nodes that compute in float32."""
    nodes = {n for n in program.graph.nodes if is_op(n, *_FULL_TARGETS) or n.meta.get("role") in ("shift", "smoothing")}
    nodes |= _before_waves(program) | _timestep_before_layers(program)
    quantised = (n for n in program.graph.nodes if is_op(n, ops.dequantize.default) and is_op(n.args[0], *QUANTISERS))
    return frozenset(nodes | set(quantised))


def _before_waves(program: Program) -> set[fx.Node]:
    """Sines and cosines with all that they are computed from: a phase reaches 1000 radians."""
    found: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if is_op(node, *_WAVES) or any(user in found for user in node.users):
            found.add(node)
    return found


def _timestep_before_layers(program: Program) -> set[fx.Node]:
    """What depends on the timestep alone, up to the first layer."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name == "timestep":
                found.add(node)
        elif node.op == "call_function" and not is_op(node, *_LAYERS):
            sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
            if sources and all(n in found for n in sources):
                found.add(node)
    return found


# ---- on the ONNX graph ---------------------------------------------------------------------------------------------


def set_precision(model: ir.Model, builder: GraphBuilder, dtype: ir.DataType) -> None:
    """Gives every node its type, in place: casts between the types, weights in the type of their reader.

    Inputs and outputs of the graph stay float32.

    Requires: `meta[PRECISION]` on every node of a model in float32.
    Raises:
        ExportError: for a weight that does not fit the type.
    """
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    if dtype == FLOAT:
        return
    types = _Types(builder, dtype)
    for node in list(model.graph):
        types.convert(node)
    for index, output in enumerate(model.graph.outputs):
        types.restore_output(model.graph, index, output)
    for name in [n for n, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


@lru_cache
def _takes(op_type: str, opset: int, dtype: ir.DataType) -> bool:
    """Whether an operator exists in a type: ONNX has convolutions in bfloat16 from opset 22 on."""
    schema = onnx.defs.get_schema(op_type, opset)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    real = [allowed[i.type_str] for i in schema.inputs if "tensor(float)" in allowed.get(i.type_str, ())]
    return not real or f"tensor({dtype.name.lower()})" in real[0]


class _Types:
    """The casts made so far."""

    def __init__(self, builder: GraphBuilder, dtype: ir.DataType) -> None:
        self._builder, self._dtype = builder, dtype
        self._twins: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def convert(self, node: ir.Node) -> None:
        """Casts a node's inputs, then notes the types of its outputs."""
        precision: Precision = node.meta[PRECISION]
        if precision is Precision.ACTIVATION and not _takes(node.op_type, self._builder.opset, self._dtype):
            precision = Precision.FULL
        if precision is Precision.PLUGIN:
            self._plugin(node)
            return
        wanted, other = (FLOAT, self._dtype) if precision is Precision.FULL else (self._dtype, FLOAT)
        if node.op_type in ("Cast", "Shape"):
            wanted = other  # they take any type: nothing is cast for them
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == other and (node.op_type, index) not in _ALWAYS_FLOAT:
                node.replace_input_with(index, self._twin(value, wanted, node))
        if precision is Precision.FULL:
            return
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(self._dtype))
        for output in node.outputs:
            if output.dtype == FLOAT:
                typed(output, self._dtype)

    def _plugin(self, node: ir.Node) -> None:
        """A plugin reads and writes real values as activations; what comes from outside it reads as it is."""
        x = node.inputs[0]
        if node.op_type in ROTATING_NODES and x is not None and x.dtype == FLOAT and x.producer() is not None:
            node.replace_input_with(0, self._twin(x, self._dtype, node))
        if "out_type" in node.attributes:
            node.attributes["out_type"] = ir.AttrInt64("out_type", int(self._dtype))
            typed(node.outputs[0], self._dtype)

    def _twin(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        key = (value, dtype)
        if key not in self._twins:
            make = self._converted if value.is_initializer() else self._cast
            self._twins[key] = make(value, dtype, reader)
        return self._twins[key]

    def _converted(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy()
        with np.errstate(over="ignore"):
            small = array.astype(_NUMPY[dtype])
        if bool((np.isinf(small.astype(np.float32)) & np.isfinite(array)).any()):
            largest = float(np.abs(array).max())
            raise ExportError(
                f"weight {value.name}",
                f"reaches {largest:.3g}, past what {dtype.name.lower()} holds",
                "Export with bf16 or fp32.",
            )
        name = f"{value.name}.{dtype.name.lower()}"
        return self._builder.initializer(name, ir.tensor(small, dtype=dtype, name=name))

    def _cast(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        name = f"{value.name}.{dtype.name.lower()}"
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}/Cast")
        node.outputs[0].name = name
        typed(node.outputs[0], dtype, None if value.shape is None else tuple(value.shape))  # type: ignore[arg-type]
        # Behind its producer, so that every later reader finds it.
        producer = value.producer()
        if producer is None:
            reader.graph.insert_before(reader, node)  # type: ignore[union-attr]
        else:
            reader.graph.insert_after(producer, node)  # type: ignore[union-attr]
        return node.outputs[0]

    def restore_output(self, graph: ir.Graph, index: int, output: ir.Value) -> None:
        """The graph's output in float32, under its own name."""
        if output.dtype != self._dtype:
            return
        name, shape = output.name, output.shape
        output.name = f"{name}.{self._dtype.name.lower()}"
        node = ir.node("Cast", [output], {"to": int(FLOAT)}, name=f"{name}/Cast")
        node.outputs[0].name = name
        typed(node.outputs[0], FLOAT)
        node.outputs[0].shape = shape
        graph.append(node)
        graph.outputs[index] = node.outputs[0]
