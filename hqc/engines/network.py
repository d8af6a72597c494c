"""What the engines need to know of a model.onnx, read without its weights: inputs, quantised products, plugins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from hqc.engines.options import BatchProfile
from hqc.errors import ArtefactError, ExportError

__all__ = ["Network", "NetworkInput", "Product", "Shapes", "profile_shapes", "read_network", "site_of"]

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input name -> its smallest, usual and largest shape."""

_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_PLUGIN_PRODUCTS = ("Int4Linear", "Int4Conv")
_MOVES = ("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Expand")
"""Operators that hand on the codes of their first input."""

_CODES: Mapping[int, str] = {onnx.TensorProto.INT8: "int8", onnx.TensorProto.INT4: "int4"}
_PLUGIN_DOMAIN = "hqc"
_BOUNDARY = "/._:@"


@dataclass(frozen=True)
class NetworkInput:
    """An input: its name, its type as ONNX names it, its sizes, None where the batch stands."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product of dequantised weights, `int8` or `int4`, and activations: `int8` or `float`.

    A plugin's product is one of `int8` activations and `int4` weights.

    weight: the name of the codes, which starts with that of the site.
    """

    node: str
    kind: str
    activations: str
    weights: str
    weight: str = ""


@dataclass(frozen=True)
class Network:
    """The facts of a model.onnx."""

    inputs: tuple[NetworkInput, ...]
    products: tuple[Product, ...]
    plugins: tuple[str, ...]
    data_files: tuple[str, ...]
    opset: int
    producer: str
    nodes: int


def read_network(path: Path) -> Network:
    """Reads a model without its external data.

    Raises:
        ArtefactError: if it is no ONNX model.
        ExportError: if an input has a size besides the batch that is not fixed.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtefactError(str(path), f"cannot be read ({error})", "Export it again.") from error
    except Exception as error:  # protobuf's DecodeError, which has moved between its modules
        if type(error).__name__ != "DecodeError":
            raise
        raise ArtefactError(str(path), "is not an ONNX model", "Export it again.") from error
    graph = model.graph
    return Network(
        inputs=_inputs(path, graph),
        products=_products(graph),
        plugins=tuple(sorted({n.op_type for n in graph.node if n.domain == _PLUGIN_DOMAIN})),
        data_files=_data_files(graph),
        opset=next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        nodes=len(graph.node),
    )


def _inputs(path: Path, graph: onnx.GraphProto) -> tuple[NetworkInput, ...]:
    weights = {tensor.name for tensor in graph.initializer}
    found = []
    for value in graph.input:
        if value.name in weights:
            continue
        kind = value.type.tensor_type
        sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        if None in sizes[1:]:
            raise ExportError(
                f"{path}, input {value.name}",
                "has a size besides the batch that is not fixed",
                "Export it with fixed sizes.",
            )
        found.append(NetworkInput(value.name, onnx.TensorProto.DataType.Name(kind.elem_type).lower(), sizes))
    return tuple(found)


def _data_files(graph: onnx.GraphProto) -> tuple[str, ...]:
    files = {
        entry.value
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(files))


def profile_shapes(network: Network, profile: BatchProfile) -> Shapes:
    """Shapes of every input whose batch is free.

    Raises:
        ExportError: if the model takes one batch only, and the profile asks for others.
    """
    free = [value for value in network.inputs if value.shape and value.shape[0] is None]
    if not free:
        taken = next((value.shape[0] for value in network.inputs if value.shape), 1)
        if {profile.min, profile.opt, profile.max} != {taken}:
            raise ExportError(
                f"profile of batches {profile}",
                f"lies outside what was exported: batches of {taken} only",
                f"Give --min-batch, --opt-batch and --max-batch {taken}, or export with a free batch.",
            )
    batches = (profile.min, profile.opt, profile.max)
    return {value.name: tuple((batch, *value.shape[1:]) for batch in batches) for value in free}  # type: ignore[misc]


def site_of(node: str, sites: Sequence[str]) -> str:
    """The site that an ONNX node belongs to: the longest name that it starts with; empty if there is none.

    >>> site_of("down.conv1/Conv", ["down", "down.conv1", "down.conv"])
    'down.conv1'
    >>> site_of("downwards/Conv", ["down"])
    ''
    """
    fitting = [site for site in sites if node.startswith(site) and (node[len(site) :] or "/")[0] in _BOUNDARY]
    return max(fitting, key=len, default="")


def _products(graph: onnx.GraphProto) -> tuple[Product, ...]:
    codes = _Codes(graph)
    found = []
    for node in graph.node:
        if node.domain == _PLUGIN_DOMAIN and node.op_type in _PLUGIN_PRODUCTS:
            found.append(Product(node.name, node.op_type, "int8", "int4", node.input[1]))
        if node.op_type not in _PRODUCTS or node.domain not in ("", "ai.onnx"):
            continue
        left, right = (codes.dequantised(name) for name in node.input[:2])
        if right is not None:
            found.append(Product(node.name, node.op_type, left or "float", right, codes.behind(node.input[1])))
    return tuple(found)


class _Codes:
    """Types of the codes behind dequantised values."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._producers = {name: node for node in graph.node for name in node.output}
        self._types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info)}
        self._types |= {tensor.name: tensor.data_type for tensor in graph.initializer}

    def dequantised(self, name: str) -> str | None:
        """`int8` or `int4` if the value is dequantised from such codes."""
        node = self._producers.get(self._source(name))
        if node is None or node.op_type != "DequantizeLinear":
            return None
        return _CODES.get(self._type(self._source(node.input[0])))

    def behind(self, name: str) -> str:
        """The name of the codes behind a dequantised value."""
        name = self._source(self._producers[self._source(name)].input[0])
        node = self._producers.get(name)
        return self._source(node.input[0]) if node is not None and node.op_type == "Cast" else name

    def _type(self, name: str) -> int:
        node = self._producers.get(name)
        if name in self._types or node is None:
            return int(self._types.get(name, onnx.TensorProto.UNDEFINED))
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Cast":
            return int(attributes["to"].i)
        if node.op_type == "Constant" and "value" in attributes:
            return int(attributes["value"].t.data_type)
        if node.domain == _PLUGIN_DOMAIN:
            return onnx.TensorProto.INT8  # hqc's nodes that a DequantizeLinear follows give int8 codes
        if node.op_type != "QuantizeLinear":
            return onnx.TensorProto.UNDEFINED
        if len(node.input) > 2 and node.input[2]:
            return self._type(node.input[2])  # codes have the type of the zero point
        return int(attributes["output_dtype"].i if "output_dtype" in attributes else onnx.TensorProto.UINT8)

    def _source(self, name: str) -> str:
        """The value that was moved into this one."""
        node = self._producers.get(name)
        while node is not None and node.op_type in _MOVES and node.input:
            name = node.input[0]
            node = self._producers.get(name)
        return name
