"""The copy of a model that verification runs: what ONNX Runtime lacks or does otherwise is spelled out.

    plugin nodes           replaced by their bodies
    GroupNormalization     two passes over the groups: ONNX's own body, which ONNX Runtime runs, takes the variance as
                           E[x²] − E[x]², which cancels; TensorRT takes the mean of (x − E[x])²
    half precision         y = Op(x) becomes  y.exact = Op(x) in float32,  y = float32(half(y.exact))

The last is what tensor cores and fused kernels do, sums in float32 and one rounding at the end, and it runs wherever
float32 does: ONNX Runtime on a CPU has no bfloat16 kernels. Weights in half precision stay as they are, each behind a
cast.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx.inliner
from onnx.helper import make_node

from hqc.errors import ExportError

__all__ = ["write_emulated"]

WIDE = onnx.TensorProto.FLOAT
_MOVES = frozenset(
    ("Reshape", "Transpose", "Slice", "Split", "Gather", "Concat", "Unsqueeze", "Squeeze", "Expand", "Identity", "Pad")
)
"""What moves values and makes no new ones has nothing to round."""

_SPELLED_OUT = "hqc.spelled_out"
# x [N, C, …] -> [N, G, M], normalised over M -> [N, C, …]·scale + bias, all in float32.
_GROUP_NORM = """
GroupNormalization <num_groups, epsilon, stash_type> (x, scale, bias) => (y) {
    real = Cast <to = 1> (x)
    count = Constant <value_int: int = @num_groups> ()
    axis_0 = Constant <value_ints = [0]> ()
    groups = Unsqueeze (count, axis_0)
    any = Constant <value_ints = [-1]> ()
    by_group = Concat <axis = 0> (axis_0, groups, any)
    rows = Reshape (real, by_group)
    ones = ConstantOfShape <value = float[1] {1.0}> (groups)
    zeros = ConstantOfShape <value = float[1] {0.0}> (groups)
    normalised = InstanceNormalization <epsilon: float = @epsilon> (rows, ones, zeros)
    channels = Shape (scale)
    by_channel = Concat <axis = 0> (axis_0, channels, any)
    columns = Constant <value_ints = [-1, 1]> ()
    factor_half = Reshape (scale, columns)
    offset_half = Reshape (bias, columns)
    factor = Cast <to = 1> (factor_half)
    offset = Cast <to = 1> (offset_half)
    split = Reshape (normalised, by_channel)
    scaled = Mul (split, factor)
    sum = Add (scaled, offset)
    shape = Shape (x)
    whole = Reshape (sum, shape)
    y = CastLike (whole, x)
}
"""


def write_emulated(model: Path, half: int) -> Path:
    """Writes the copy beside a model, where its large weights lie.

    half: ONNX's number of the type between the sites; float32 rounds nothing.
    """
    proto = onnx.inliner.inline_local_functions(_spelled_out(onnx.load(str(model), load_external_data=False)))
    kinds = _kinds(proto) if half != WIDE else {}
    stored = {t.name for t in proto.graph.initializer if t.data_type == half} if half != WIDE else set()
    nodes = [make_node("Cast", [n], [f"{n}.wide"], name=f"{n}.wide/Cast", to=WIDE) for n in sorted(stored)]
    for node in proto.graph.node:
        nodes += _emulated(node, kinds, half, stored)
    for value in proto.graph.value_info:
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = WIDE
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    path = model.with_name("emulated.onnx")
    onnx.save(proto, str(path))
    return path


def _spelled_out(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Group norms as calls of a function."""
    opset = next(one.version for one in proto.opset_import if one.domain == "")
    norms = [node for node in proto.graph.node if node.op_type == "GroupNormalization"]
    for node in norms:
        node.domain = _SPELLED_OUT
    if norms:
        proto.opset_import.append(onnx.helper.make_opsetid(_SPELLED_OUT, 1))
        head = f'<domain: "{_SPELLED_OUT}", opset_import: ["" : {opset}]>\n'
        proto.functions.append(onnx.parser.parse_function(head + _GROUP_NORM))
    return proto


def _kinds(proto: onnx.ModelProto) -> dict[str, int]:
    """The type of every value."""
    known = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=False).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.input, *known.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in known.initializer}
    untyped = [name for node in proto.graph.node for name in node.output if name and not kinds.get(name)]
    if untyped:
        raise ExportError("export verification", f"{untyped[0]} has no type", "Report a bug.")
    return kinds


def _emulated(node: onnx.NodeProto, kinds: Mapping[str, int], half: int, stored: set[str]) -> Iterator[onnx.NodeProto]:
    """The node in float32, and the rounding of each of its results that was in half precision."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for index, name in enumerate(copy.input):
        if name in stored:
            copy.input[index] = f"{name}.wide"
    rounded = [] if copy.op_type in _MOVES else [i for i, name in enumerate(copy.output) if kinds.get(name) == half]
    for attribute in copy.attribute:
        if attribute.name in ("to", "output_dtype", "dtype") and attribute.i == half:
            attribute.i = WIDE
    for index in rounded:
        copy.output[index] = f"{node.output[index]}.exact"
    yield copy
    for index in rounded:
        name = node.output[index]
        yield make_node("Cast", [f"{name}.exact"], [f"{name}.half"], name=f"{name}.half/Cast", to=half)
        yield make_node("Cast", [f"{name}.half"], [name], name=f"{name}/Wide", to=WIDE)
