"""A model with every plugin node, as the TensorRT export writes them."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PLUGIN = {"plugin_namespace": "hqc", "plugin_version": "1", "aot": 1}


def _info(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes: tuple[str, ...] = ("image", "conv", "tokens", "linear"), weight: type = np.int8) -> onnx.ModelProto:
    """x [N, 64, 8, 8] -> rotated, convolved to 96 channels; t [N, 77, 64] -> rotated, multiplied to 96; all float16.

    "image bounded" and "tokens bounded" give codes between bounds that every sample has of its own.
    """
    half, real, code = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT8

    def node(op: str, inputs: list[str], output: str, name: str, **attributes: int) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=name, domain="hqc", **attributes, **PLUGIN)

    operands = ["scale_w", "scale_a", "bias"]
    turn = {"block": 32, "regular": 0}
    codes = {**turn, "low": -7, "high": 7}
    window = {"kernel": 3, "stride": 1, "padding": 1}
    known = {
        "image": node("HadamardQuantize", ["x", "inverse"], "q", "site.codes", channel_axis=1, **codes),
        "conv": node("Int4Conv", ["q", "w_conv", *operands], "y", "site", block=32, out_type=half, regular=0, **window),
        "tokens": node("HadamardQuantize", ["t", "inverse"], "r", "line.codes", channel_axis=-1, **codes),
        "image bounded": node(
            "HadamardQuantizeBounded", ["x", "step"], "p", "image bounded.codes", channel_axis=1, **turn
        ),
        "tokens bounded": node(
            "HadamardQuantizeBounded", ["t", "step"], "s", "tokens bounded.codes", channel_axis=-1, **turn
        ),
        "linear": node("Int4Linear", ["r", "w_linear", *operands], "z", "line", block=32, out_type=half, regular=0),
    }
    values = {
        "x": _info("x", half, ["N", 64, 8, 8]),
        "t": _info("t", half, ["N", 77, 64]),
        "inverse": _info("inverse", real, ["N"]),
        "step": _info("step", real, ["N", 3]),
        "scale_a": _info("scale_a", real, ["N"]),
        "q": _info("q", code, ["N", 64, 8, 8]),
        "r": _info("r", code, ["N", 77, 64]),
        "p": _info("p", code, ["N", 64, 8, 8]),
        "s": _info("s", code, ["N", 77, 64]),
        "y": _info("y", half, ["N", 96, 8, 8]),
        "z": _info("z", half, ["N", 77, 96]),
    }
    weights = {
        "w_conv": np.zeros((96, 9 * 32), weight),
        "w_linear": np.zeros((96, 32), weight),
        "scale_w": np.ones(96, np.float32),
        "bias": np.zeros(96, np.float32),
    }
    chosen = [known[name] for name in nodes]
    made = {n.output[0] for n in chosen}
    read = {name for n in chosen for name in n.input}
    graph = helper.make_graph(
        chosen,
        "plugins",
        [values[name] for name in values if name in read - made],
        [values[name] for name in values if name in made - read],
        [numpy_helper.from_array(array, name) for name, array in weights.items() if name in read],
        value_info=[values[name] for name in values if name in made & read],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("hqc", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="hqc tensorrt")
