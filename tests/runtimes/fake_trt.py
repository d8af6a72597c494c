"""As much of TensorRT as the runtime touches; an engine of it computes 2·sample + timestep (+ condition) on the CPU.

A plan is JSON: {"inputs": {name: [type, sizes]}, "outputs": {…}, "batches": [smallest, usual, largest]}.
"""

import ctypes
import json
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "HALF": np.float16}


class Severity(Enum):
    ERROR = 1
    WARNING = 2


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    INT64 = 8


class Strategy(Enum):
    USER_MANAGED = 2


class ILogger:
    def __init__(self) -> None:
        pass


class Context:
    """Reads and writes at the addresses that it is given."""

    def __init__(self, engine: "Engine") -> None:
        self.engine, self.shapes, self.addresses, self.memory = engine, dict[str, Any](), dict[str, int](), None
        self.streams: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return name not in self.engine.data.get("refuses", [])

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        if self.engine.data.get("fails"):
            return False
        assert self.memory is not None, "TensorRT needs scratch memory"
        values = {name: self._array(name, self._shape(name)) for name in self.engine.data["inputs"]}
        sample = values.pop("sample")
        out = self._array("output", sample.shape)
        out[:] = 2 * sample
        for value in values.values():
            out += value.reshape(-1, *[1] * (sample.ndim - 1)).astype(np.float32)
        return True

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name) or tuple(self.engine.data["inputs"][name][1])

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        data = self.engine.data
        kind = NUMPY[(data["inputs"] | data["outputs"])[name][0]]
        count = int(np.prod(shape)) * np.dtype(kind).itemsize
        buffer = (ctypes.c_char * count).from_address(self.addresses[name])
        return np.frombuffer(buffer, kind).reshape(shape)


class Engine:
    device_memory_size_v2 = 1000

    def __init__(self, data: dict[str, Any]) -> None:
        self.data, self.contexts = data, list[Context]()
        self.names = [*data["inputs"], *data["outputs"]]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.data["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[(self.data["inputs"] | self.data["outputs"])[name][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple((self.data["inputs"] | self.data["outputs"])[name][1])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        sizes = self.get_tensor_shape(name)[1:]
        return [(batch, *sizes) for batch in self.data["batches"]]

    def create_execution_context(self, strategy: Strategy) -> Context:
        assert strategy is Strategy.USER_MANAGED
        self.contexts.append(Context(self))
        return self.contexts[-1]


def module(version: str, *, ahead_of_time: bool = True) -> tuple[ModuleType, list[Engine]]:
    """The module, and the engines that it will have loaded."""
    loaded: list[Engine] = []

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            data = json.loads(plan)
            if "error" in data:
                self.logger.log(Severity.WARNING, "this is no reason")
                self.logger.log(Severity.ERROR, data["error"])
                return None
            loaded.append(Engine(data))
            return loaded[-1]

    trt = ModuleType("tensorrt")
    trt.__spec__ = ModuleSpec("tensorrt", None)
    attributes = {
        "__version__": version,
        "ILogger": ILogger,
        "Runtime": Runtime,
        "TensorIOMode": TensorIOMode,
        "ExecutionContextAllocationStrategy": Strategy,
    }
    for name, value in attributes.items():
        setattr(trt, name, value)
    if ahead_of_time:
        trt.QuickPluginCreationRequest = object  # type: ignore[attr-defined]
    return trt, loaded
