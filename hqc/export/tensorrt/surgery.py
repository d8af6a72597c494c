"""The last edits, with onnx-graphsurgeon: plugin attributes, names, order; and what TensorRT would refuse is refused.

The tool works on the file's message alone: large weights stay where they lie, in the file beside it.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from hqc.errors import ExportError, RuntimeMissingError
from hqc.export.builder import HQC_DOMAIN
from hqc.export.tensorrt.functions import PLUGIN_ATTRIBUTES, PLUGIN_NODES
from hqc.wording import listed

__all__ = ["finish", "graphsurgeon", "structure_problems"]

BANNED = frozenset(
    ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear", "DynamicQuantizeLSTM")
)
"""Integer operators that TensorRT's parser does not know."""


def graphsurgeon() -> Any:
    """The module onnx_graphsurgeon.

    Raises:
        RuntimeMissingError: if it is not installed.
    """
    try:
        import onnx_graphsurgeon as gs
        from onnx_graphsurgeon.logger import G_LOGGER
    except ImportError as error:
        raise RuntimeMissingError(
            "target tensorrt", "onnx-graphsurgeon is not installed", "Run `pip install onnx-graphsurgeon`."
        ) from error
    G_LOGGER.severity = G_LOGGER.ERROR  # it warns about every type that numpy lacks, and keeps it
    return gs


def finish(path: Path) -> int:
    """Edits a written model in place; the number of its nodes.

    Raises:
        RuntimeMissingError: if onnx-graphsurgeon is not installed.
        ExportError: naming everything in the graph that TensorRT's parser refuses.
    """
    gs = graphsurgeon()
    source = onnx.load(str(path), load_external_data=False)
    graph = gs.import_onnx(source)
    for node in graph.nodes:
        if node.domain == HQC_DOMAIN:
            node.attrs |= PLUGIN_ATTRIBUTES
    _name_nodes(graph)
    graph.cleanup().toposort()
    result = gs.export_onnx(graph)
    result.metadata_props.extend(source.metadata_props)
    if problems := structure_problems(result):
        raise ExportError(
            "target tensorrt",
            f"does not take that {listed(problems, 5)}",
            "Rewrite that part of the model, or give --target onnxruntime.",
            lists=True,
        )
    onnx.save(result, str(path))
    return len(result.graph.node)


def _name_nodes(graph: Any) -> None:
    """Every node has a name of its own: TensorRT names layers after them."""
    taken: Counter[str] = Counter()
    for node in graph.nodes:
        name = node.name or node.op
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"


def structure_problems(model: onnx.ModelProto) -> list[str]:
    """What TensorRT's parser or builder would refuse, or run in floating point."""
    types = onnx.TensorProto
    problems = []
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in BANNED:
            problems.append(f"{node.name} is a {node.op_type}")
        if node.domain not in ("", HQC_DOMAIN) or (node.domain and node.op_type not in PLUGIN_NODES):
            problems.append(f"{node.name} is of domain {node.domain}")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            problems += _pair_problems(node, constants)
    repeated = [name for name, count in Counter(n.name for n in model.graph.node).items() if count > 1]
    problems += [f"{name} names several nodes" for name in repeated]
    functions = Counter((f.domain, f.name) for f in model.functions)
    problems += [f"function {name} is there twice" for name, count in functions.items() if count > 1]
    for function in model.functions:
        if any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in function.node):
            problems.append(f"function {function.name} holds a quantiser")
    wide = [t.name for t in constants.values() if t.data_type in (types.DOUBLE, types.UINT16, types.UINT32)]
    return problems + [f"{name} is of a type that TensorRT lacks" for name in wide]


def _pair_problems(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> list[str]:
    types = onnx.TensorProto
    if len(node.input) < 3 or any(name not in constants for name in node.input[1:3]):
        return [f"{node.name} has a scale or a zero point that is not constant"]
    scale, zero = (constants[name] for name in node.input[1:3])
    problems = []
    if zero.data_type not in (types.INT8, types.INT4):
        problems.append(f"{node.name} quantises to {types.DataType.Name(zero.data_type)}")
    if list(zero.dims) != list(scale.dims):
        problems.append(f"{node.name} has {list(zero.dims)} zero points for {list(scale.dims)} scales")
    if any(zero.raw_data) or any(zero.int32_data):
        problems.append(f"{node.name} has a zero point that is not zero")
    if len(scale.dims) > 0 and node.input[0] not in constants:
        problems.append(f"{node.name} scales an activation by channel")
    return problems
