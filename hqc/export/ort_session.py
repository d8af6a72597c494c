"""Opening an ONNX Runtime session on the CPU, or saying what is missing; running it on a batch of any timesteps."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hqc.errors import ArtefactError, EvaluationError, MemoryShortError, RuntimeMissingError, is_memory_error
from hqc.memory import available_bytes, bytes_text, resident_bytes, return_free_memory
from hqc.wording import first_words

__all__ = ["TENSORRT_PRODUCER", "import_onnxruntime", "open_session", "run_session", "takes_one_timestep"]

TENSORRT_PRODUCER = "hqc tensorrt"
"""The producer in a file for TensorRT."""

_SILENT = 4
_TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"
_MUCH = 2**28
_SMALL_TENSOR = 2**14


def import_onnxruntime() -> Any:
    """onnxruntime, without what it writes into the temporary folder and sends away when it is imported.

    Of late it counts sessions for its makers, and leaves a file `.ses`. Whoever sets ORT_DISABLE_TELEMETRY, or
    has imported it before, is left alone.

    Raises:
        RuntimeMissingError: if it is not installed.
    """
    ours = _TELEMETRY_OFF not in os.environ
    if ours:
        os.environ[_TELEMETRY_OFF] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(
            "runtime onnxruntime", "the package is not installed", "Run `pip install onnxruntime`."
        ) from error
    finally:
        if ours:
            os.environ.pop(_TELEMETRY_OFF, None)
    return onnxruntime


def open_session(
    model: Path, *, threads: int | None = None, optimisation: str = "all", save_to: Path | None = None
) -> Any:
    """An InferenceSession; `optimisation` is disabled, basic, extended or all.

    In a file for TensorRT, QuantizeLinear and DequantizeLinear run as they are written. Elsewhere the runtime fuses
    them with a product into 8-bit kernels, of which those for x86 without VNNI saturate and the one for INT4 weights
    quantises the activations once more.

    save_to: also writes the optimised model there, its large weights in a file beside it.

    Raises:
        RuntimeMissingError: if onnxruntime is not installed.
        ArtefactError: if onnxruntime refuses the model. MemoryShortError: if memory runs out while it opens it.
    """
    onnxruntime = import_onnxruntime()
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.graph_optimization_level = {
        "disabled": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[optimisation]
    if _is_for_tensorrt(model):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
        prefix = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{prefix}file_name", f"{save_to.name}.data")
        # Shape inference reads the small ones.
        options.add_session_config_entry(f"{prefix}min_size_in_bytes", str(_SMALL_TENSOR))
    before = resident_bytes()
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if is_memory_error(error):
            raise _too_large(model) from error
        first = str(error).strip().splitlines()[0]
        raise ArtefactError(str(model), f"onnxruntime refuses it ({first})", "Export it again.") from error
    return_free_memory(before + _MUCH)  # folding the weights leaves much behind
    return session


def _too_large(model: Path) -> MemoryShortError:
    size = sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*"))  # its weights may lie beside it
    available = available_bytes()
    there = "" if available is None else f"; {bytes_text(available)} are available"
    return MemoryShortError(
        str(model),
        f"memory ran out while onnxruntime opened it, {bytes_text(size)} in files{there}",
        "Close other programs, or take a machine with more memory: opening takes a few times its size.",
    )


def _is_for_tensorrt(model: Path) -> bool:
    """By the producer's name, which is the second field of the message: it stands in the first bytes of the file."""
    with suppress(OSError), model.open("rb") as file:
        return TENSORRT_PRODUCER.encode() in file.read(64)
    return False


def takes_one_timestep(session: Any) -> bool:
    """Whether every call is for one timestep."""
    return any(value.name == "timestep" and list(value.shape) == [1] for value in session.get_inputs())


def run_session(
    session: Any, names: Sequence[str], feeds: Mapping[str, Any], *, one_timestep: bool | None = None
) -> list[Any]:
    """The named outputs; a model that takes one timestep a call is called once for every timestep of the batch.

    one_timestep: what `takes_one_timestep` has said of the session, which is asked at every call otherwise.

    Raises:
        EvaluationError: if the runtime cannot go on: an index out of range.
        MemoryShortError: if memory runs out.
    """
    times = feeds.get("timestep")

    def run(given: Mapping[str, Any]) -> list[Any]:
        try:
            return list(session.run(list(names), dict(given)))
        except Exception as error:  # onnxruntime has an exception a kind of failure, all of them its own
            if is_memory_error(error):
                found = f"memory ran out in a call ({first_words(error)})"
                raise MemoryShortError("onnxruntime", found, "Run fewer samples at once.") from error
            what = "give labels that the model was trained on" if "out of" in str(error) else "export it again"
            raise EvaluationError(
                "onnxruntime", f"cannot run the model ({first_words(error)})", f"Check the inputs; {what}."
            ) from error

    if times is None or not (takes_one_timestep(session) if one_timestep is None else one_timestep):
        return run(feeds)
    groups = [np.flatnonzero(times == t) for t in np.unique(times)]
    parts = []
    for rows in groups:
        part = {name: array[rows] for name, array in feeds.items()}
        found = run({**part, "timestep": times[rows[:1]]})
        parts.append([_each_row(value, len(rows)) for value in found])
    back = np.argsort(np.concatenate(groups))
    return [found[0] if found[0].ndim == 0 else np.concatenate(found)[back] for found in zip(*parts, strict=True)]


def _each_row(value: Any, rows: int) -> Any:
    """What depends on the timestep alone is one row for all samples."""
    alone = value.ndim > 0 and len(value) == 1
    return np.repeat(value, rows, axis=0) if alone and rows > 1 else value
