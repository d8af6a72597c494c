"""Engines: an export folder's model.onnx, compiled by TensorRT-RTX or TensorRT. Importing this loads nothing heavy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.engines.build import build_engines, check_request
    from hqc.engines.key import engine_key
    from hqc.engines.options import BatchProfile, BuildOptions
    from hqc.engines.record import EngineRecord, LoadedPlan, load_plan
    from hqc.engines.report import BuiltEngine, EngineReport

__all__ = [
    "BatchProfile",
    "BuildOptions",
    "BuiltEngine",
    "EngineRecord",
    "EngineReport",
    "LoadedPlan",
    "build_engines",
    "check_request",
    "engine_key",
    "load_plan",
]

_WHERE = {
    "BatchProfile": "options",
    "BuildOptions": "options",
    "BuiltEngine": "report",
    "EngineRecord": "record",
    "EngineReport": "report",
    "LoadedPlan": "record",
    "build_engines": "build",
    "check_request": "build",
    "engine_key": "key",
    "load_plan": "record",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hqc.engines' has no attribute {name!r}")
    return getattr(import_module(f"hqc.engines.{_WHERE[name]}"), name)
