"""A copy of a half-precision model that computes in float32 and rounds where the model rounds.

    y = Op(x)    with y in float16 or bfloat16    ->    y.wide = Op(x) in float32,  y = float32(half(y.wide))

This is what tensor cores and fused kernels do, sums in float32 and one rounding at the end, and it runs wherever
float32 does: ONNX Runtime on a CPU has no bfloat16 kernels. Weights in half precision stay as they are, each behind a
cast. Plugin nodes are replaced by their bodies first.
"""

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.inliner

from hqc.errors import ExportError

__all__ = ["write_emulated"]

_MOVES = frozenset(
    ("Reshape", "Transpose", "Slice", "Split", "Gather", "Concat", "Unsqueeze", "Squeeze", "Expand", "Identity", "Pad")
)
"""What moves values and makes no new ones has nothing to round."""


def write_emulated(model: Path, half: int) -> Path:
    """Writes the copy beside a model, where its large weights lie; half: ONNX's number of the type."""
    proto = onnx.inliner.inline_local_functions(onnx.load(str(model), load_external_data=False))
    kinds = _kinds(proto)
    wide, stored = onnx.TensorProto.FLOAT, {t.name for t in proto.graph.initializer if t.data_type == half}
    nodes = list(_stored_casts(proto, stored, wide))
    for node in proto.graph.node:
        nodes += _emulated(node, kinds, half, wide, stored)
    for value in proto.graph.value_info:
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = wide
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    path = model.with_name("emulated.onnx")
    onnx.save(proto, str(path))
    return path


def _kinds(proto: onnx.ModelProto) -> dict[str, int]:
    """The type of every value."""
    known = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=False).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.input, *known.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in known.initializer}
    untyped = [name for node in proto.graph.node for name in node.output if name and not kinds.get(name)]
    if untyped:
        raise ExportError("export verification", f"{untyped[0]} has no type", "Report a bug.")
    return kinds


def _stored_casts(proto: onnx.ModelProto, stored: set[str], wide: int) -> Iterator[onnx.NodeProto]:
    for name in sorted(stored):
        yield onnx.helper.make_node("Cast", [name], [f"{name}.wide"], name=f"{name}.wide/Cast", to=wide)


def _emulated(
    node: onnx.NodeProto, kinds: dict[str, int], half: int, wide: int, stored: set[str]
) -> Iterator[onnx.NodeProto]:
    """The node in float32, and the rounding of each of its results that was in half precision."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for index, name in enumerate(copy.input):
        if name in stored:
            copy.input[index] = f"{name}.wide"
    rounded = [] if copy.op_type in _MOVES else [i for i, name in enumerate(copy.output) if kinds.get(name) == half]
    for attribute in copy.attribute:
        if attribute.name in ("to", "output_dtype", "dtype") and attribute.i == half:
            attribute.i = wide
    for index in rounded:
        copy.output[index] = f"{node.output[index]}.exact"
    yield copy
    for index in rounded:
        name = node.output[index]
        yield onnx.helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], name=f"{name}.half/Cast", to=half)
        yield onnx.helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}/Wide", to=wide)
