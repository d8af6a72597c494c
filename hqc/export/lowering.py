"""Program -> ONNX graph: every fx node is translated by one function, chosen by its operator."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from hqc.errors import ExportError
from hqc.export.builder import GraphBuilder, typed
from hqc.export.interface import OUTPUT
from hqc.program import BATCH, Program, is_op
from hqc.sites import QuantisedSite, watched_sites, with_residual
from hqc.wording import listed

__all__ = ["OUTPUT", "Listen", "Lowering", "Tap", "Translation", "Translations", "is_size", "onnx_dtype"]

_DTYPES: Mapping[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float64": ir.DataType.DOUBLE,
    "float16": ir.DataType.FLOAT16,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int16": ir.DataType.INT16,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
}


def onnx_dtype(dtype: str | torch.dtype) -> ir.DataType:
    """torch.float32 or "float32" -> FLOAT.

    Raises:
        ExportError: for a type that no export writes.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ExportError(f"dtype {name}", "has no ONNX counterpart here", "Capture the model in float32.")
    return _DTYPES[name]


@dataclass(frozen=True)
class Listen:
    """An ONNX value by name, and the permutation of its axes that gives torch's layout (None: it has it)."""

    name: str
    perm: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Tap:
    """Where verification listens at a site.

    `input` behind any smoothing and before rotation, `codes` after quantisation, `output` after the bias; `weights` are
    the int8 matrices [K, O] of its integer products; `zero_point` is what the codes carry on top of torch's; `rounding`
    is what the type of the output adds to the relative error, 0 for float32. `joint`: no node holds the quantised
    value, and `output` is that of the product of these codes and of the site's partner.
    """

    input: Listen
    codes: Listen
    output: Listen
    zero_point: int = 0
    weights: tuple[str, ...] = ()
    largest_code: int = 0
    rounding: float = 0.0
    joint: bool = False


class Lowering:
    """The state of one translation: the graph so far, the ONNX value of every fx node, the taps of every site."""

    def __init__(
        self, program: Program, translations: "Translations", opset: int, *, one_timestep: bool = False
    ) -> None:
        self.program = program
        self.shared = _of_the_timestep(program) if one_timestep else frozenset()
        self.builder = GraphBuilder(opset)
        self.translations = translations
        self.values: dict[fx.Node, Any] = {}
        self.codes: dict[fx.Node, ir.Value] = {}  # of quantisers whose value is real
        self.joint: set[fx.Node] = set()  # quantised values whose codes a product reads, instead of themselves
        self.taps: Mapping[str, Tap] = {}

    def run(self) -> ir.Model:
        """Translates every node; the model still lacks functions.

        Raises:
            ExportError: naming every operator that has no translation.
        """
        self._check_operators()
        for node in self.program.graph.nodes:
            self.translate(node)
        # A transpose that its readers absorbed is dropped below: listening goes to the value behind it.
        self.taps = self._find_taps()
        self._drop_unused()
        model = ir.Model(self.builder.graph, ir_version=_IR_VERSIONS.get(self.builder.opset, 10))
        model.producer_name = "hqc"
        return model

    def knows(self, node: fx.Node) -> bool:
        """Whether the table has a translation for a node; arithmetic on sizes needs none."""
        return node.op != "call_function" or node.target in self.translations or is_size(node)

    def _check_operators(self) -> None:
        unknown = {str(node.target) for node in self.program.graph.nodes if not self.knows(node)}
        if unknown:
            raise ExportError(
                "export",
                f"no ONNX translation for {listed(sorted(unknown), 8)}",
                "Use other layers, or the torch runtime.",
                lists=True,
            )

    def translate(self, node: fx.Node) -> None:
        """Adds what one node becomes to the graph; those before it must be there.

        Raises:
            ExportError: if the node is none that this target can write.
        """
        builder = self.builder
        if node.op == "placeholder":
            spec = next(s for s in self.program.inputs if s.name == node.name)
            self.values[node] = builder.input(spec.name, onnx_dtype(spec.dtype), self.shape(node))
        elif node.op == "output":
            self._finish(node)
        elif node.op != "get_attr" and not is_size(node):
            result = self.translations[node.target](self, node)
            self.values[node] = result
            if isinstance(result, ir.Value):
                self._describe(node, result)

    def _describe(self, node: fx.Node, value: ir.Value) -> None:
        if value.is_initializer() or value.is_graph_input():
            return
        dtype = node.meta.get("dtype")
        if value.shape is None and "shape" in node.meta:
            value.shape = ir.Shape(self.shape(node))
        if value.type is None and dtype is not None:
            typed(value, onnx_dtype(dtype))

    def _finish(self, node: fx.Node) -> None:
        result = self.value(node.args[0])
        value = typed(self.builder.op("Identity", result, name=OUTPUT), ir.DataType.FLOAT, self.shape(node.args[0]))
        producer = result.producer()
        if producer is not None and len(producer.outputs) == 1 and not result.is_graph_input():
            identity = value.producer()
            assert identity is not None
            self.builder.graph.remove(identity, safe=True)
            value, result.name = result, OUTPUT
            typed(value, ir.DataType.FLOAT, self.shape(node.args[0]))
        self.builder.graph.outputs.append(value)

    def _drop_unused(self) -> None:
        graph = self.builder.graph
        kept = {id(v) for v in graph.outputs}
        heard = {listen.name for tap in self.taps.values() for listen in (tap.input, tap.codes, tap.output)}
        for node in reversed(list(graph)):
            if not any(id(out) in kept or out.uses() or out.name in heard for out in node.outputs):
                graph.remove(node, safe=True)
        for name in [n for n, v in graph.initializers.items() if not v.uses() and id(v) not in kept]:
            del graph.initializers[name]

    # ---- what translations ask for ---------------------------------------------------------------------------------

    def value(self, node: Any) -> ir.Value:
        """The ONNX value of a node; weights become initialisers when first asked for."""
        if node.op == "get_attr":
            name = str(node.target)
            return self.builder.initializer(name, torch_tensor(self.program.state[name], name))
        found = self.values[node]
        if not isinstance(found, ir.Value):
            raise ExportError(f"node {node.name}", "is not a single tensor", "Rewrite that part of the model.")
        return found

    def values_of(self, nodes: Sequence[Any]) -> list[ir.Value]:
        """The values of several nodes."""
        return [self.value(n) for n in nodes]

    def optional(self, node: Any) -> ir.Value | None:
        """The value of a node, or None for None."""
        return None if node is None else self.value(node)

    def shape(self, node: Any) -> tuple[int | str, ...]:
        """The shape that the program notes for a node.

        Raises:
            ExportError: if it notes none.
        """
        if node.op == "get_attr":
            return tuple(self.program.state[str(node.target)].shape)
        if "shape" not in node.meta:
            raise ExportError(f"node {node.name}", "has no shape", "Capture the program again.")
        shape = tuple(node.meta["shape"])
        return (1, *shape[1:]) if node in self.shared and shape[:1] == (BATCH,) else shape

    def static_shape(self, node: Any) -> list[int]:
        """A node's shape with -1 for the one axis that depends on the batch.

        Raises:
            ExportError: if more than one axis does.
        """
        shape = [d if isinstance(d, int) else -1 for d in self.shape(node)]
        if shape.count(-1) > 1:
            raise ExportError(
                f"node {node.name}", f"has shape {self.shape(node)}: two free axes", "Capture it with fixed sizes."
            )
        return shape

    def scalar_like(self, node: fx.Node) -> str:
        """The numpy dtype of a node's result."""
        return str(node.meta.get("dtype", "float32"))

    def _find_taps(self) -> dict[str, Tap]:
        taps = {}
        for site in watched_sites(self.program):
            found, joint = self.codes.get(site.quantiser) or self.value(site.quantiser), site.real in self.joint
            output = site.product if joint else with_residual(site.layer)
            heard = (self.value(site.x), found, self.value(output))
            x, codes, result = (listen(value) for value in heard)
            taps[site.site] = Tap(x, codes, result, joint=joint, **self.tap_details(site))
        return taps

    def tap_details(self, site: QuantisedSite) -> dict[str, Any]:
        """The fields of a site's tap that depend on the target."""
        return {}


def _of_the_timestep(program: Program) -> frozenset[fx.Node]:
    """The nodes that depend on the timestep and on no other input: one row serves the batch.

    Raises:
        ExportError: where such a row is joined with rows of the batch by anything but broadcasting.
    """
    shared: set[fx.Node] = set()
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name == "timestep":
                shared.add(node)
            continue
        values = [n for n in node.all_input_nodes if n not in constant and not is_size(n)]
        if node.op == "get_attr" or (node.all_input_nodes and all(n in constant for n in node.all_input_nodes)):
            constant.add(node)
        elif values and all(n in shared for n in values):
            shared.add(node)
    for node in program.graph.nodes:
        mixed = node not in shared and any(n in shared for n in node.all_input_nodes)
        if mixed and node.target in _JOINING:
            raise ExportError(
                f"node {node.name}", "joins the timestep's row with rows of the batch", "Export without one timestep."
            )
    return frozenset(shared)


_JOINING = (torch.ops.aten.cat.default, torch.ops.aten.stack.default, torch.ops.aten.bmm.default)


def listen(value: ir.Value) -> Listen:
    """The value itself, or what stands behind it if it is a transpose."""
    producer = value.producer()
    if producer is None or producer.op_type != "Transpose" or producer.inputs[0] is None:
        return Listen(str(value.name))
    return Listen(str(producer.inputs[0].name), tuple(producer.attributes["perm"].as_ints()))


Translation = Callable[[Lowering, fx.Node], Any]
Translations = Mapping[Any, Translation]

_IR_VERSIONS: Mapping[int, int] = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}


def is_size(node: fx.Node) -> bool:
    """Whether a node is arithmetic on sizes: shapes are read from the program's notes instead."""
    if node.op != "call_function":
        return False
    if is_op(node, torch.ops.aten.sym_size.int):
        return True
    return not isinstance(node.target, torch._ops.OpOverload) and not _is_item(node)


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def torch_tensor(tensor: torch.Tensor, name: str) -> ir.TensorProtocol:
    """A torch tensor as an ONNX tensor that shares its memory."""
    return ir.tensor(tensor.detach().cpu().contiguous().numpy(), name=name)


def batch_dims(lowering: Lowering, shape: Sequence[int | str]) -> ir.Value:
    """A shape as an int64 vector in the graph, N read from the first input."""
    builder = lowering.builder
    if all(isinstance(d, int) for d in shape):
        return builder.ints(*[int(d) for d in shape])
    if any(isinstance(d, str) and d != BATCH for d in shape):
        raise ExportError(
            "export", f"shape {list(shape)} is not a plain function of the batch", "Capture it differently."
        )
    batch = builder.op("Shape", builder.graph.inputs[0], start=0, end=1, name="batch")
    parts = [batch if isinstance(d, str) else builder.ints(d) for d in shape]
    return builder.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]
