"""Runs in a process of its own with TensorRT's real bindings: `python bindings_probe.py` prints JSON of what they did.

NVIDIA's Python code around quickly deployable plugins runs as it is; what it asks of a builder, which there is none of
here, stands in below: expressions that are numbers at once.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "hqc" / "plugins"))  # as an export has it beside it

import hqc_qdp
import tensorrt as trt
from hqc_qdp.table import Kernel

CASES: dict[str, dict[str, Any]] = {
    "image": {
        "op": "HadamardQuantize",
        "attributes": {"block": 32, "low": -7, "high": 7, "channel_axis": 1, "regular": 0},
        "inputs": [("HALF", "LINEAR", (-1, 64, 9, 7)), ("FLOAT", "LINEAR", (-1,))],
        "output": ("INT8", "HWC16", (-1, 64, 9, 7)),
    },
    "image last": {
        "op": "HadamardQuantize",
        "attributes": {"block": 32, "low": -7, "high": 7, "channel_axis": 1, "regular": 0},
        "inputs": [("HALF", "HWC8", (-1, 64, 9, 7)), ("FLOAT", "LINEAR", (-1,))],
        "output": ("INT8", "HWC16", (-1, 64, 9, 7)),
    },
    "tokens": {
        "op": "HadamardQuantize",
        "attributes": {"block": 64, "low": -127, "high": 127, "channel_axis": -1, "regular": 1},
        "inputs": [("BF16", "LINEAR", (-1, 77, 192)), ("FLOAT", "LINEAR", (-1,))],
        "output": ("INT8", "LINEAR", (-1, 77, 192)),
    },
    "tokens bounded": {
        "op": "HadamardQuantizeBounded",
        "attributes": {"block": 64, "channel_axis": -1, "regular": 1},
        "inputs": [("BF16", "LINEAR", (-1, 77, 192)), ("FLOAT", "LINEAR", (-1, 3))],
        "output": ("INT8", "LINEAR", (-1, 77, 192)),
    },
    "linear": {
        "op": "Int4Linear",
        "attributes": {"block": 32, "out_type": 16, "regular": 0},
        "inputs": [
            ("INT8", "LINEAR", (-1, 77, 192)),
            ("INT8", "LINEAR", (96, 96)),
            ("FLOAT", "LINEAR", (96,)),
            ("FLOAT", "LINEAR", (-1,)),
            ("FLOAT", "LINEAR", (96,)),
        ],
        "output": ("BF16", "LINEAR", (-1, 77, 96)),
    },
    "conv": {
        "op": "Int4Conv",
        "attributes": {"block": 32, "kernel": 3, "stride": 2, "padding": 1, "out_type": 10, "regular": 0},
        "inputs": [
            ("INT8", "HWC16", (-1, 64, 9, 7)),
            ("INT8", "LINEAR", (96, 288)),
            ("FLOAT", "LINEAR", (96,)),
            ("FLOAT", "LINEAR", (-1,)),
            ("FLOAT", "LINEAR", (96,)),
        ],
        "output": ("HALF", "HWC8", (-1, 96, 5, 4)),
    },
}
BATCH = 3
AHEAD_OF_TIME = hqc_qdp.ahead_of_time(trt)


class Kernels:
    """Two tactics for whatever is asked, with tiles that differ; notes what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def tactics(self, key: str) -> tuple[Kernel, ...]:
        self.asked.append(key)
        tiles = ((64, 64), (16, 32))
        return tuple(Kernel(f"k{i}", f"entry{i}", b"ptx%d" % i, "sm_80", tiles[i], 4 + i, 100 * i, 8) for i in range(2))


class Expression(trt.IDimensionExpr):
    """A size as a number; the base class has no constructor for Python."""


def expression(value: int) -> Expression:
    made = Expression.__new__(Expression)
    made.value = value
    return made


class Builder:
    """TensorRT's builder of expressions."""

    def constant(self, value: int) -> Expression:
        return expression(int(value))

    def operation(self, operation: Any, left: Expression, right: Expression) -> Expression:
        compute = {
            "SUM": lambda a, b: a + b,
            "SUB": lambda a, b: a - b,
            "PROD": lambda a, b: a * b,
            "FLOOR_DIV": lambda a, b: a // b,
            "CEIL_DIV": lambda a, b: -(-a // b),
        }[operation.name]
        return expression(compute(left.value, right.value))


class Shape(list):
    """`trt.DimsExprs`, which holds nothing but a builder's own expressions."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


def description(kind: tuple[str, str, tuple[int, ...]]) -> Any:
    dtype, layout, dims = kind
    found = trt.DynamicPluginTensorDesc()
    found.desc.type = getattr(trt.DataType, dtype)
    found.desc.format = getattr(trt.TensorFormat, layout)
    found.desc.dims = dims
    return found


def fields(attributes: dict[str, int]) -> tuple[Any, list[Any]]:
    """As the parser makes them: one int32 each. The arrays are returned too: a field does not own its data."""
    arrays = [np.array([value], np.int32) for value in attributes.values()]
    made = [trt.PluginField(n, a, trt.PluginFieldType.INT32) for n, a in zip(attributes, arrays, strict=True)]
    return trt.PluginFieldCollection(made), arrays


def create(case: dict[str, Any]) -> Any:
    creator = trt.get_plugin_registry().get_creator(case["op"], "1", "hqc")
    collection, arrays = fields(case["attributes"])
    if AHEAD_OF_TIME:
        request = trt.QuickPluginCreationRequest.STRICT_AOT
        plugin = creator.create_plugin(case["op"], "hqc", collection, trt.TensorRTPhase.BUILD, request)
    else:
        plugin = creator.create_plugin(case["op"], collection, trt.TensorRTPhase.BUILD)
    del arrays
    return plugin


def probe(case: dict[str, Any], kernels: Kernels) -> dict[str, Any]:
    """Everything that TensorRT asks of a plugin while it builds."""
    kernels.asked.clear()
    plugin = create(case)
    inputs, output = [description(kind) for kind in case["inputs"]], description(case["output"])
    types = [value.desc.type for value in inputs]
    ranks = [[len(value.desc.dims) for value in inputs]] if AHEAD_OF_TIME else []
    sizes = [[expression(BATCH if size < 0 else size) for size in kind[2]] for kind in case["inputs"]]
    found = {
        "class": type(plugin).__name__,
        "output types": [dtype.name for dtype in plugin.get_output_data_types(types, *ranks)],
        "output shape": [size.value for size in plugin.get_output_shapes(sizes, [], Builder())[0]],
    }
    parts = [*inputs, output]
    if AHEAD_OF_TIME:
        offered = [(c.type.name, c.format.name) for c in plugin.get_supported_format_combinations(parts, len(inputs))]
        found["formats"] = [offered[i : i + len(parts)] for i in range(0, len(offered), len(parts))]
    else:
        found["supported"] = [plugin.supports_format_combination(i, parts, len(inputs)) for i in range(len(parts))]
        linear = [description((kind[0], "CHW32", kind[2])) for kind in case["inputs"]]
        found["refused"] = plugin.supports_format_combination(0, [*linear, output], len(inputs))
    plugin.configure_plugin(inputs, [output])
    found["tactics"] = list(plugin.get_valid_tactics())
    found["launches"] = [launch(plugin, tactic, inputs, output) for tactic in found["tactics"]]
    if not AHEAD_OF_TIME:
        found["fields"] = {f.name: int(f.data[0]) for f in plugin.get_fields_to_serialize()}
        found["clone"] = [type(plugin.clone()).__name__, plugin.clone().plugin_name]
    return {**found, "asked": sorted(set(kernels.asked))}


def launch(plugin: Any, tactic: int, inputs: list[Any], output: Any) -> dict[str, Any]:
    """What TensorRT is told of a tactic's kernel, or, before 10.9, what is launched."""
    plugin.set_tactic(tactic)
    if not AHEAD_OF_TIME:
        return enqueue(plugin, inputs, output)
    settings, integers = SimpleNamespace(), Integers()
    plugin.get_launch_params(None, [*inputs, output], len(inputs), settings, integers, Builder())
    entry, ptx = plugin.get_kernel([value.desc for value in inputs], [output.desc])
    return {
        "entry": entry.decode(),
        "ptx": ptx.decode(),
        "grid": [settings.grid_x, settings.grid_y, settings.grid_z],
        "threads": settings.block_x,
        "shared": settings.shared_mem,
        "integers": [integers[i] for i in range(integers.nbSymExprs)],
    }


class Integers(dict):
    """Takes the 32-bit arguments by position."""

    nbSymExprs = 0


def enqueue(plugin: Any, inputs: list[Any], output: Any) -> dict[str, Any]:
    """With the launch caught before it reaches a driver; every pointer is a number that tells which it is."""
    caught: dict[str, Any] = {}

    class Caught:
        def launch(self, pointers: Any, integers: Any, out: int, grid: Any, threads: int, stream: int) -> None:
            caught.update(
                pointers=[*pointers, out], integers=list(integers), grid=list(grid), threads=threads, stream=stream
            )

    def load(ptx: bytes, entry: str, shared: int) -> Caught:
        caught.update(ptx=ptx.decode(), entry=entry, shared=shared)
        return Caught()

    importlib.import_module("hqc_qdp.version3").load_kernel = load
    descriptions = []
    for value in (*inputs, output):
        description = trt.PluginTensorDesc()
        description.type, description.format = value.desc.type, value.desc.format
        description.dims = tuple(BATCH if size < 0 else size for size in value.desc.dims)
        descriptions.append(description)
    pointers = list(range(1, len(inputs) + 1))
    plugin.on_shape_change(descriptions[:-1], descriptions[-1:])
    plugin.enqueue(descriptions[:-1], descriptions[-1:], pointers, [99], 0, 7)
    return caught


def main() -> None:
    kernels = Kernels()
    hqc_qdp.register_kernels(kernels)
    hqc_qdp.register_kernels(kernels)  # again, as a second export does
    creators = [c for c in trt.get_plugin_registry().all_creators if c.plugin_namespace == "hqc"]
    if AHEAD_OF_TIME:
        importlib.import_module("tensorrt_bindings.plugin._plugin_class").trt = patched()
        importlib.import_module("tensorrt_bindings.plugin._tensor").SymExprImpl = lambda e: e._expr.value
    else:
        importlib.import_module("hqc_qdp.version3").trt = patched()
    report = {
        "version": trt.__version__,
        "numpy": np.__version__,
        "ahead of time": AHEAD_OF_TIME,
        "creators": {c.name: [(f.name, f.type.name) for f in c.field_names] for c in creators},
        "versions": sorted({c.plugin_version for c in creators}),
        "cases": {name: probe(case, kernels) for name, case in CASES.items()},
    }
    print(json.dumps(report))


def patched() -> SimpleNamespace:
    """The module with a shape that takes the expressions from above."""
    return SimpleNamespace(**{name: getattr(trt, name) for name in dir(trt)} | {"DimsExprs": Shape})


if __name__ == "__main__":
    main()
