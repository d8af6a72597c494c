"""Opening an ONNX Runtime session on the CPU, or saying what is missing."""

from pathlib import Path
from typing import Any

from hqc.errors import ArtefactError, RuntimeMissingError

__all__ = ["open_session"]

_SILENT = 3


def open_session(model: Path, *, threads: int | None = None, optimisation: str = "all") -> Any:
    """An InferenceSession; `optimisation` is disabled, basic, extended or all.

    Raises:
        RuntimeMissingError: if onnxruntime is not installed.
        ArtefactError: if onnxruntime refuses the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(
            "runtime onnxruntime", "the package is not installed", "Run `pip install onnxruntime`."
        ) from error
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.graph_optimization_level = {
        "disabled": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[optimisation]
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ArtefactError(str(model), f"onnxruntime refuses it ({first})", "Export it again.") from error
