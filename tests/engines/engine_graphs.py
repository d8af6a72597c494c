"""Small ONNX graphs in the form that the TensorRT export writes, and export folders around them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hqc.storage import write_manifest

CONV, LINEAR = "block.conv1", "block.attn.to_q"
BLOCK = 32


class Graph:
    """Nodes and initialisers under construction."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def weight(self, name: str, array: "NDArray[np.generic] | np.generic") -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, *inputs: str, name: str, **attributes: object) -> str:
        node = helper.make_node(kind, inputs, [name], name=f"{name}/{kind}", **attributes)
        self.nodes.append(node)
        return name

    def model(
        self,
        inputs: Sequence[tuple[str, int, Sequence[int | str]]],
        output: tuple[str, int, Sequence[int | str]],
        producer: str = "hqc",
    ) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info(*value) for value in inputs]
        graph = helper.make_graph(
            self.nodes, "hqc", values, [helper.make_tensor_value_info(*output)], self.initializers
        )
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name=producer
        )
        onnx.checker.check_model(made, full_check=True)
        return made


def hadamard(order: int = BLOCK) -> NDArray[np.float32]:
    """H/√order, Sylvester's."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(order)).astype(np.float32)


def _quantised(g: Graph, u: str, site: str, rank: int) -> str:
    """Scaled by the timestep, clipped to 4 bits, quantised and dequantised with a constant scale."""
    shape = (10, *[1] * (rank - 1))
    inverse = g.weight(f"{site}.inverse", g.random.uniform(0.5, 2, shape).astype(np.float32))
    scale = g.weight(f"{site}.s0", np.float32(0.125))
    zero = g.weight(f"{site}.zero", np.int8(0))
    low, high = g.weight(f"{site}.low", np.float32(-0.875)), g.weight(f"{site}.high", np.float32(0.875))
    row = g.op("Gather", inverse, "timestep", name=f"{site}.row", axis=0)
    scaled = g.op("Mul", u, row, name=f"{site}.scaled")
    clipped = g.op("Clip", scaled, low, high, name=f"{site}.clipped")
    codes = g.op("QuantizeLinear", clipped, scale, zero, name=f"{site}.codes")
    return g.op("DequantizeLinear", codes, scale, zero, name=f"{site}.real")


def _weight(g: Graph, site: str, shape: Sequence[int], outputs_axis: int, suffix: str = "") -> str:
    outputs = shape[outputs_axis]
    codes = g.weight(f"{site}.weight_q{suffix}", g.random.integers(-127, 128, shape).astype(np.int8))
    scale = g.weight(f"{site}.weight_s{suffix}", g.random.uniform(0.01, 0.02, outputs).astype(np.float32))
    zero = g.weight(f"{site}.weight_z{suffix}", np.zeros(outputs, np.int8))
    return g.op("DequantizeLinear", codes, scale, zero, name=f"{site}.weight{suffix}", axis=outputs_axis)


def _finished(g: Graph, product: str, site: str, rank: int, bias: NDArray[np.float32], dtype: int) -> None:
    shape = (10, *[1] * (rank - 1))
    table = g.weight(f"{site}.scales", g.random.uniform(0.5, 2, shape).astype(np.float32))
    row = g.op("Gather", table, "timestep", name=f"{site}.out_row", axis=0)
    scaled = g.op("Mul", product, row, name=f"{site}.rescaled")
    added = g.op("Add", scaled, g.weight(f"{site}.bias", bias), name=f"{site}.added")
    g.op("Cast", added, name="y", to=dtype)


def conv_model(
    *,
    channels: int = 64,
    kernel: int = 3,
    stride: int = 1,
    digits: int = 1,
    half: bool = True,
    batch: int | str = "N",
    edit: Callable[[Graph], None] | None = None,
) -> onnx.ModelProto:
    """Rotation as a grouped 1×1 convolution, constant-scale quantiser, int8 convolution in one or two digits."""
    g, site = Graph(), CONV
    dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    tiled = np.tile(hadamard(), (channels // BLOCK, 1))[:, :, None, None]
    x = g.op("Cast", "x", name=f"{site}.x", to=TensorProto.FLOAT)
    u = g.op("Conv", x, g.weight(f"{site}.h", tiled), name=f"{site}.rotated", group=channels // BLOCK)
    real = _quantised(g, u, site, 4)
    shape = (channels, channels, kernel, kernel)
    window = {"pads": [kernel // 2] * 4, "strides": [stride] * 2}
    parts = [
        g.op("Conv", real, _weight(g, site, shape, 0, f"_{i}"), name=f"{site}.{i}", **window) for i in range(digits)
    ]
    product = parts[0] if digits == 1 else g.op("Add", *parts, name=f"{site}.digits")
    _finished(g, product, site, 4, g.random.normal(size=(1, channels, 1, 1)).astype(np.float32), dtype)
    if edit is not None:
        edit(g)
    size = 8 // stride
    return g.model(
        [("x", dtype, [batch, channels, 8, 8]), ("timestep", TensorProto.INT64, [batch])],
        ("y", dtype, [batch, channels, size, size]),
    )


def linear_model(*, channels: int = 64, outputs: int = 96, tokens: int = 16, int4: bool = False) -> onnx.ModelProto:
    """Rotation as a product between reshapes, int8 product; with `int4` a weight-only product on float activations."""
    g, site = Graph(1), LINEAR
    blocks = g.weight("blocks", np.array([0, tokens, channels // BLOCK, BLOCK], np.int64))
    whole = g.weight("whole", np.array([0, tokens, channels], np.int64))
    x = g.op("Cast", "x", name=f"{site}.x", to=TensorProto.FLOAT)
    split = g.op("Reshape", x, blocks, name=f"{site}.split")
    rotated = g.op("MatMul", split, g.weight(f"{site}.h", hadamard()), name=f"{site}.rotated")
    u = g.op("Reshape", rotated, whole, name=f"{site}.u")
    if int4:
        codes = g.random.integers(-8, 8, (channels, outputs))
        packed = helper.make_tensor(f"{site}.q", TensorProto.INT4, codes.shape, codes.flatten().tolist())
        g.initializers.append(packed)
        scale = g.weight(f"{site}.s", g.random.uniform(0.01, 0.02, outputs).astype(np.float32))
        left, right = u, g.op("DequantizeLinear", f"{site}.q", scale, name=f"{site}.weight", axis=1)
    else:
        left, right = _quantised(g, u, site, 3), _weight(g, site, (channels, outputs), 1)
    product = g.op("MatMul", left, right, name=site)
    _finished(g, product, site, 3, g.random.normal(size=outputs).astype(np.float32), TensorProto.FLOAT16)
    return g.model(
        [("x", TensorProto.FLOAT16, ["N", tokens, channels]), ("timestep", TensorProto.INT64, ["N"])],
        ("y", TensorProto.FLOAT16, ["N", tokens, outputs]),
    )


def runtime_scale_model() -> onnx.ModelProto:
    """A quantiser whose scale is an input: TensorRT-RTX 1.7 crashes on it."""
    model = conv_model()
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == f"{CONV}.s0":
                node.input[i] = "scale"
    model.graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, []))
    return model


def integer_conv_model() -> onnx.ModelProto:
    """QLinearConv, which no TensorRT parses."""
    g = Graph()
    one, zero = g.weight("one", np.float32(1)), g.weight("zero", np.int8(0))
    weight = g.weight("weight", np.ones((8, 8, 1, 1), np.int8))
    codes = g.op("QuantizeLinear", "x", one, zero, name="codes")
    product = g.op("QLinearConv", codes, one, zero, weight, one, zero, one, zero, name=CONV)
    g.op("DequantizeLinear", product, one, zero, name="y")
    shape = ["N", 8, 4, 4]
    return g.model([("x", TensorProto.FLOAT, shape)], ("y", TensorProto.FLOAT, shape))


def plugin_model() -> onnx.ModelProto:
    """One of hqc's nodes, for which no TensorRT-RTX has a plugin."""
    model = conv_model()
    node = helper.make_node("HadamardQuantize", ["x"], ["unused"], name="p", domain="hqc", plugin_namespace="hqc")
    model.graph.node.append(node)
    model.opset_import.append(helper.make_opsetid("hqc", 1))
    return model


def save_export(folder: Path, model: onnx.ModelProto, *, external: bool = False, target: str = "tensorrt") -> Path:
    """A folder as `hqc export` leaves it, with a report and a plan of two sites."""
    folder.mkdir(parents=True)
    options = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 64} if external else {}
    onnx.save(model, folder / "model.onnx", **options)
    (folder / "plan.json").write_text(json.dumps({"sites": [{"site": CONV}, {"site": LINEAR}]}), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps({"layers": [{"site": CONV}]}), encoding="utf-8")
    write_manifest(folder, "hqc-export", {"target": target})
    return folder
