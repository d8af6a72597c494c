"""Building an ONNX graph value by value: named nodes, shared constants, equal nodes merged, transposes composed."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["HQC_DOMAIN", "MICROSOFT_DOMAIN", "Attribute", "GraphBuilder", "to_nchw", "to_nhwc"]

HQC_DOMAIN = "hqc"
MICROSOFT_DOMAIN = "com.microsoft"

Attribute = int | float | str | Sequence[int] | ir.DataType
Dims = Sequence[int | str]

_NHWC, _NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


class GraphBuilder:
    """An ONNX graph under construction. Two requests for the same operation on the same values give one node."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="hqc")
        self._seen: dict[object, tuple[ir.Value, ...]] = {}
        self._names: set[str] = set()
        self.again: list[ir.Node] = []
        """Nodes that were asked for again and given as they are, until somebody empties the list."""

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        """A graph input."""
        value = ir.Value(name=self._unique(name), type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A weight stored in the file under its own name."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        self._names.add(name)
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def constant(self, array: NDArray[np.generic], hint: str = "constant") -> ir.Value:
        """A small constant; equal ones are stored once."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._seen:
            name = self._unique(hint)
            self._seen[key] = (self.initializer(name, ir.tensor(array, name=name)),)
        return self._seen[key][0]

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(np.asarray(values, dtype=np.int64), "ints")

    def scalar(self, value: float, dtype: str = "float32") -> ir.Value:
        """A scalar of the given numpy dtype."""
        return self.constant(np.asarray(value, dtype=dtype), "scalar")

    def op(
        self, op_type: str, *inputs: ir.Value | None, name: str = "", domain: str = "", **attributes: Attribute
    ) -> ir.Value:
        """The only output of a node; `name` is a wish for the name of its value."""
        return self.ops(op_type, *inputs, count=1, name=name, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        count: int,
        name: str = "",
        domain: str = "",
        **attributes: Attribute,
    ) -> tuple[ir.Value, ...]:
        """The outputs of a node."""
        plain = {
            k: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in attributes.items()
        }
        key = (domain, op_type, tuple(map(id, inputs)), tuple(sorted(plain.items())), count)
        if key in self._seen:
            found = self._seen[key]
            if (producer := found[0].producer()) is not None:
                self.again.append(producer)
            return found
        wish = name or op_type.lower()
        outputs = [ir.Value(name=self._unique(wish if i == 0 else f"{wish}.{i}")) for i in range(count)]
        if domain:
            self.graph.opset_imports[domain] = 1
        node = ir.Node(domain, op_type, inputs, [_attribute(k, v) for k, v in plain.items()], outputs=outputs)
        node.name = f"{outputs[0].name}/{op_type}"
        self.graph.append(node)
        self._seen[key] = tuple(outputs)
        return tuple(outputs)

    def reshape(self, x: ir.Value, shape: Sequence[int], name: str = "") -> ir.Value:
        """x with a new shape; one entry may be -1, a 0 copies the axis. x itself if it has that shape already."""
        producer = x.producer()
        if producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None and 0 not in shape:
            return self.reshape(producer.inputs[0], shape, name)
        if x.shape is not None and len(x.shape) == len(shape) and all(map(_fits, x.shape, shape)):
            return x
        return self.op("Reshape", x, self.ints(*shape), name=name)

    def cast(self, x: ir.Value, dtype: ir.DataType, name: str = "") -> ir.Value:
        """x in another type; x itself if it has that type."""
        return x if x.dtype == dtype else typed(self.op("Cast", x, name=name, to=dtype), dtype)

    def transpose(self, x: ir.Value, perm: Sequence[int], name: str = "") -> ir.Value:
        """x with permuted axes; a transpose of a transpose becomes one, and none where they cancel."""
        producer = x.producer()
        if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
            inner = producer.attributes["perm"].as_ints()
            return self.transpose(producer.inputs[0], [inner[p] for p in perm], name)
        if list(perm) == list(range(len(perm))):
            return x
        return typed(self.op("Transpose", x, name=name, perm=perm), x.dtype)

    def rename(self, value: ir.Value, name: str) -> None:
        """Gives a value a new name if that is free."""
        if name not in self._names and not value.is_graph_input() and not value.is_initializer():
            self._names.add(name)
            value.name = name

    def _unique(self, wish: str) -> str:
        name, count = wish, 0
        while name in self._names:
            count += 1
            name = f"{wish}_{count}"
        self._names.add(name)
        return name


def _fits(have: object, wanted: int) -> bool:
    return have == wanted if isinstance(have, int) else wanted == -1


def to_nhwc(builder: GraphBuilder, x: ir.Value, name: str = "") -> ir.Value:
    """[N, C, H, W] -> [N, H, W, C]."""
    return builder.transpose(x, _NHWC, name)


def to_nchw(builder: GraphBuilder, x: ir.Value, name: str = "") -> ir.Value:
    """[N, H, W, C] -> [N, C, H, W]."""
    return builder.transpose(x, _NCHW, name)


def typed(value: ir.Value, dtype: ir.DataType | None, shape: Dims | None = None) -> ir.Value:
    """The value with its type noted, and its shape where that is known."""
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    if shape is not None:
        value.shape = ir.Shape(shape)
    return value


def _attribute(name: str, value: object) -> ir.Attr:
    if isinstance(value, ir.DataType):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, bool | int):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, tuple):
        return ir.AttrInt64s(name, value)
    raise TypeError(f"attribute {name} is a {type(value).__name__}")
