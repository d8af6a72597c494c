"""The plugin nodes of a model, with the types and sizes that their kernels depend on."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from hqc.errors import ExportError
from hqc.plugins.hqc_qdp.nodes import OPS, Choice
from hqc.plugins.hqc_qdp.problems import PluginError

__all__ = ["PluginNode", "plugin_nodes"]

DOMAIN = "hqc"
AGAIN = "Export the program again."
_TYPES: Mapping[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.INT8: "int8",
}


@dataclass(frozen=True)
class PluginNode:
    """One node: attributes by name, sizes of every input (None: the batch), type of every input."""

    name: str
    op: str
    attributes: Mapping[str, int]
    dims: tuple[tuple[int | None, ...], ...]
    types: tuple[str, ...]

    def choices(self) -> tuple[Choice, ...]:
        """The ways to run it.

        Raises:
            ExportError: naming the node, if there is none.
        """
        try:
            found = OPS[self.op].choices(self.dims, self.types[0], self.attributes)
        except PluginError as error:
            raise ExportError(f"node {self.name}, {error.where}", error.found, error.do) from error
        for choice in found:
            wanted = choice.types[: len(self.types)]
            if self.types != wanted:
                # TensorRT has no uint8 weights: its parser widens them to int32.
                what = f"takes {', '.join(self.types)}, expected {', '.join(wanted)}"
                raise ExportError(f"node {self.name}, {self.op}", what, AGAIN)
        return found


def plugin_nodes(model: onnx.ModelProto) -> tuple[PluginNode, ...]:
    """The nodes of domain hqc; the model may have been read without its external data.

    Raises:
        ExportError: for one that is no plugin, or whose attributes, types or sizes are not there.
    """
    if not any(node.domain == DOMAIN for node in model.graph.node):
        return ()
    known = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False, data_prop=False).graph
    values = {value.name: value.type.tensor_type for value in (*known.input, *known.output, *known.value_info)}
    types = {name: kind.elem_type for name, kind in values.items()}
    dims = {name: _dims(kind) for name, kind in values.items() if kind.HasField("shape")}
    types |= {tensor.name: tensor.data_type for tensor in known.initializer}
    dims |= {tensor.name: tuple(tensor.dims) for tensor in known.initializer}
    return tuple(_plugin_node(node, types, dims) for node in model.graph.node if node.domain == DOMAIN)


def _dims(kind: onnx.TypeProto.Tensor) -> tuple[int | None, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)


def _type_name(number: int) -> str:
    return _TYPES.get(number) or onnx.TensorProto.DataType.Name(number).lower()


def _plugin_node(
    node: onnx.NodeProto, types: Mapping[str, int], dims: Mapping[str, tuple[int | None, ...]]
) -> PluginNode:
    where = f"node {node.name}, {node.op_type}"
    if node.op_type not in OPS:
        raise ExportError(where, f"is no plugin; there are {', '.join(OPS)}", "Export with this version of hqc.")
    op = OPS[node.op_type]
    attributes = {a.name: int(a.i) for a in node.attribute if a.name in op.attributes}
    if missing := [name for name in op.attributes if name not in attributes]:
        raise ExportError(where, f"lacks {', '.join(missing)}", AGAIN)
    if len(node.input) != len(op.inputs):
        raise ExportError(where, f"has {len(node.input)} inputs, expected {len(op.inputs)}", AGAIN)
    if unknown := [name for name in node.input if name not in types or name not in dims]:
        raise ExportError(where, f"the type or the sizes of {unknown[0]} are not known", AGAIN)
    return PluginNode(
        name=node.name,
        op=node.op_type,
        attributes=attributes,
        dims=tuple(dims[name] for name in node.input),
        types=tuple(_type_name(types[name]) for name in node.input),
    )
