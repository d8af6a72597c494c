"""As much of `tensorrt` and `tensorrt.plugin` as the plugins touch, with sizes that are numbers.

Its decorators check what TensorRT's do: annotations that are objects, every attribute named, four parts returned.
tests/plugins/test_plugins_bindings.py runs the same plugins in the real module.
"""

import inspect
import typing
from enum import Enum
from types import ModuleType
from typing import Any


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    BF16 = 7


class TensorFormat(Enum):
    LINEAR = 0
    HWC8 = 2
    HWC = 8
    HWC16 = 11


class TensorDesc:
    """A tensor whose sizes are known; the batch too."""

    def __init__(self, shape: tuple[int, ...], dtype: DataType, layout: TensorFormat = TensorFormat.LINEAR) -> None:
        self.shape_expr, self.shape, self.dtype, self.format = shape, shape, dtype, layout

    def like(self) -> "TensorDesc":
        return TensorDesc(self.shape, self.dtype, self.format)


class KernelLaunchParams:
    grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
    shared_mem = 0


class SymExprs(list):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class AutoTuneCombination:
    def __init__(self, io_types: str, layouts: str, tactics: list[int]) -> None:
        self.io_types, self.layouts, self.tactics = io_types, layouts, tactics


class Registry:
    """What was decorated, by name; refuses what TensorRT refuses."""

    def __init__(self) -> None:
        self.functions: dict[str, dict[str, Any]] = {}
        self.all_creators: list[Any] = []

    def register(self, name: str) -> Any:
        def decorate(function: Any) -> Any:
            signature = inspect.signature(function)
            for parameter in signature.parameters.values():
                assert not isinstance(parameter.annotation, str), "annotations are text"
                assert parameter.default is inspect.Parameter.empty
            assert signature.return_annotation is TensorDesc
            assert name not in self.functions, "registered twice"
            self.functions[name] = {"register": function}
            return function

        return decorate

    def _second(self, kind: str, ending: list[str]) -> Any:
        def make(name: str) -> Any:
            def decorate(function: Any) -> Any:
                described = list(inspect.signature(self.functions[name]["register"]).parameters)
                assert list(inspect.signature(function).parameters) == [*described, *ending]
                returned = inspect.signature(function).return_annotation
                assert typing.get_origin(returned) is (tuple if kind == "aot_impl" else list)
                assert len(typing.get_args(returned)) == (4 if kind == "aot_impl" else 1)
                self.functions[name][kind] = function
                return function

            return decorate

        return make


def modules(*, version: str = "11.4.0.106") -> tuple[dict[str, ModuleType], Registry]:
    """For sys.modules, and what the plugins will have registered."""
    registry = Registry()
    trt, plugin = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    for name, value in {
        "__version__": version,
        "__path__": [],
        "QuickPluginCreationRequest": object,
        "DataType": DataType,
        "TensorFormat": TensorFormat,
        "float32": DataType.FLOAT,
        "float16": DataType.HALF,
        "bfloat16": DataType.BF16,
        "int8": DataType.INT8,
        "plugin": plugin,
        "get_plugin_registry": lambda: registry,
    }.items():
        setattr(trt, name, value)
    for name, value in {
        "TensorDesc": TensorDesc,
        "KernelLaunchParams": KernelLaunchParams,
        "SymExprs": SymExprs,
        "SymIntExprs": SymExprs,
        "SymInt32": int,
        "AutoTuneCombination": AutoTuneCombination,
        "from_shape_expr": TensorDesc,
        "cdiv": lambda a, b: -(-a // b),
        "register": registry.register,
        "autotune": registry._second("autotune", ["outputs"]),
        "aot_impl": registry._second("aot_impl", ["outputs", "tactic"]),
    }.items():
        setattr(plugin, name, value)
    return {"tensorrt": trt, "tensorrt.plugin": plugin}, registry
