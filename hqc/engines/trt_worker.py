"""Builds one engine with TensorRT 10.8 to 11: `python -m hqc.engines.trt_worker REQUEST.json ANSWER.json`.

Needs the GPU that the engine is for. Kernels are timed; the timings are kept in a file of their own, so that a second
build of a similar network takes a fraction of the time.
"""

from pathlib import Path
from typing import Any

from hqc.atomic import write_file
from hqc.engines.requests import BuildRequest
from hqc.engines.worker import BuildLog, BuildProblem, Hooks, main

__all__ = ["HOOKS"]


def _register_plugins(trt: Any, request: BuildRequest) -> None:
    """Those of the export's own folder, if its model has plugin nodes."""
    if not request.plugins:
        return
    from hqc.errors import HqcError
    from hqc.plugins import register

    try:
        register(Path(request.onnx).parent)
    except HqcError as error:
        raise BuildProblem("plugins", str(error)) from error


def _take_timings(trt: Any, config: Any, request: BuildRequest) -> None:
    if request.timing_cache is None:
        return
    path = Path(request.timing_cache)
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildProblem("timing cache", f"{path} is of another card or version: remove it")


def _layers(trt: Any, config: Any, plan: Any, log: BuildLog, request: BuildRequest) -> str:
    """Keeps the timings; the layers come from the engine's inspector, with the formats of the usual shapes."""
    if request.timing_cache is not None:
        write_file(Path(request.timing_cache), bytes(config.get_timing_cache().serialize()))
    engine = trt.Runtime(log.logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildProblem("inspection", "the engine that was built cannot be loaded here")
    inspector, context = engine.create_engine_inspector(), engine.create_execution_context()
    for name, (_, usual, _) in request.shapes.items():
        context.set_input_shape(name, tuple(usual))
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))


HOOKS = Hooks("tensorrt", _register_plugins, _take_timings, _layers)

if __name__ == "__main__":
    main(HOOKS)
