"""Builds one engine with TensorRT-RTX: `python -m hqc.engines.rtx_worker REQUEST.json ANSWER.json`."""

from typing import Any

from hqc.engines.requests import BuildRequest
from hqc.engines.worker import BuildLog, BuildProblem, Hooks, main

__all__: list[str] = []


def _prepare(trt: Any, request: BuildRequest) -> None:
    """Nothing: there are no plugins."""


def _target(trt: Any, config: Any, request: BuildRequest) -> None:
    """One architecture, that of the request, whatever this machine has."""
    member = getattr(trt.ComputeCapability, request.arch.upper().replace("_", ""), None)
    config.num_compute_capabilities = 1
    if member is None or not config.set_compute_capability(member, 0):
        raise BuildProblem("architecture", f"{request.arch} is none that this version builds for")


def _layers(trt: Any, config: Any, plan: Any, log: BuildLog, request: BuildRequest) -> str:
    """From the log: an engine can be loaded, and inspected, only where there is a GPU."""
    return log.layers


if __name__ == "__main__":
    main(Hooks("tensorrt_rtx", _prepare, _target, _layers))
