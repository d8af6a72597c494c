"""The child process that runs one contender: `python -m hqc.evaluation.bench.worker`.

One JSON object a line on standard input, one answer a line on standard output:

    {"do": "load", "runtime": "onnxruntime", "model": PATH, "inputs": FILE.npz, "threads": 2}
        -> {"load_seconds": …, "runtime_resident_bytes": …, "loaded_resident_bytes": …, "notes": […]}
    {"do": "prepare"}                -> {"seconds": …}       first calls, where these compile or capture
    {"do": "run"}                    -> {"milliseconds": …}
    {"do": "output", "file": PATH}   -> {}                   the output of one more run, as .npy
    {"do": "memory"}                 -> {"resident_bytes": …, "peak_resident_bytes": …, "device_bytes": …}
    {"do": "stop"}                   -> {}

What goes wrong is answered with {"error": …}. Only the runtime asked for is imported: its memory is counted.
"""

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from hqc.evaluation.bench.memory import peak_resident_bytes, resident_bytes
from hqc.export.interface import Interface, interface_of

__all__ = ["RUNTIMES", "Worker", "main"]

Arrays = Mapping[str, NDArray[np.float32]]
Call = Callable[[], NDArray[np.float32]]

GPU_RUN_SECONDS = 0.2
"""About as long does one timed run on a GPU last: as many calls as fit, so that its clocks and queue are warm."""


@dataclass(frozen=True)
class Loaded:
    """A loaded model: its output on the CPU, the milliseconds of one call, the bytes that it takes of a GPU.

    prepare: once, before anything is timed. notes: what a reader of its figures should know.
    """

    output: Call
    milliseconds: Callable[[], float]
    device_bytes: Callable[[], int] = lambda: 0
    prepare: Callable[[], None] = lambda: None
    notes: tuple[str, ...] = ()


def on_cpu(call: Call) -> Loaded:
    """Times a call by the clock on the wall."""

    def milliseconds() -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    return Loaded(call, milliseconds)


def _onnxruntime(threads: int) -> Callable[[Path, Arrays], Loaded]:
    """Default session options: every optimisation, the runtime's own thread pool."""
    from hqc.export.ort_session import import_onnxruntime, open_session, run_session, takes_one_timestep

    import_onnxruntime()  # before the clock of the load starts

    def load(model: Path, inputs: Arrays) -> Loaded:
        session = open_session(model, threads=threads)
        taken = {value.name for value in session.get_inputs()}
        feeds = {name: array for name, array in _interface(model).feeds(inputs).items() if name in taken}
        output = session.get_outputs()[0].name
        once = takes_one_timestep(session)
        return on_cpu(lambda: run_session(session, [output], feeds, one_timestep=once)[0])

    return load


def _interface(model: Path) -> Interface:
    """What a model's inputs are called: an export's manifest says it, other files have hqc's names."""
    manifest = model.with_name("manifest.json")
    if not manifest.is_file():
        return Interface()
    return interface_of(json.loads(manifest.read_text(encoding="utf-8")), model.parent)


def _torch(threads: int) -> Callable[[Path, Arrays], Loaded]:
    """A Program folder in eager mode without gradients."""
    import torch

    from hqc.runtimes.torch_runtime import TorchSession
    from hqc.storage import load_program

    torch.set_num_threads(threads)

    def load(model: Path, inputs: Arrays) -> Loaded:
        session = TorchSession(load_program(model))
        tensors = [torch.from_numpy(inputs[spec.name]) for spec in session.inputs]
        return on_cpu(lambda: session(*tensors).numpy())

    return load


def _torch_compile(threads: int) -> Callable[[Path, Arrays], Loaded]:
    """A Program folder compiled by inductor at the first call, for the inputs' sizes."""
    import torch

    from hqc.evaluation.bench.torch_compile import CompiledSession
    from hqc.storage import load_program

    torch.set_num_threads(threads)

    def load(model: Path, inputs: Arrays) -> Loaded:
        session = CompiledSession(load_program(model))
        tensors = [torch.from_numpy(inputs[spec.name]) for spec in session.inputs]
        timed = on_cpu(lambda: session(*tensors).numpy())
        return replace(timed, prepare=lambda: session.compile(*tensors))

    return load


def _openvino(threads: int) -> Callable[[Path, Arrays], Loaded]:
    """OpenVINO's CPU device with its own choices, for the inputs' sizes."""
    import openvino

    def load(model: Path, inputs: Arrays) -> Loaded:
        core = openvino.Core()
        network = core.read_model(model)
        feeds = {port.any_name: inputs[port.any_name] for port in network.inputs}
        network.reshape({name: list(array.shape) for name, array in feeds.items()})
        compiled = core.compile_model(network, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
        del network
        request, output = compiled.create_infer_request(), compiled.output(0)
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        notes = () if precision == "f32" else (f"what is not int8 runs in {precision}, OpenVINO's choice on this CPU",)
        return replace(on_cpu(lambda: request.infer(feeds)[output]), notes=notes)

    return load


def _torch_int8(threads: int) -> Callable[[Path, Arrays], Loaded]:
    """A Program folder in integer products on the CPU; what is compiled for it is there before the clock starts."""
    import torch

    from hqc.runtimes.integer.cpu.kernels import cpu_kernels
    from hqc.runtimes.integer.cpu.operators import require_operators
    from hqc.runtimes.integer.cpu.session import CpuSession
    from hqc.storage import load_program

    torch.set_num_threads(threads)
    require_operators()
    cpu_kernels()

    def load(model: Path, inputs: Arrays) -> Loaded:
        session = CpuSession(load_program(model))
        tensors = [torch.from_numpy(inputs[spec.name]) for spec in session.inputs]
        return on_cpu(lambda: session(*tensors).numpy())

    return load


def _cuda(
    session_class: str, module: str = "session", **options: Any
) -> Callable[[int], Callable[[Path, Arrays], Loaded]]:
    """A Program folder in a session of a module of `hqc.runtimes.integer.cuda`, inputs and outputs on the GPU."""

    def prepare(threads: int) -> Callable[[Path, Arrays], Loaded]:
        import torch

        from hqc.runtimes.integer.cuda.session import require_cuda
        from hqc.storage import load_program

        sessions = importlib.import_module(f"hqc.runtimes.integer.cuda.{module}")
        torch.set_num_threads(threads)
        require_cuda()

        def load(model: Path, inputs: Arrays) -> Loaded:
            session = getattr(sessions, session_class)(load_program(model), **options)
            tensors = [torch.from_numpy(inputs[spec.name]).cuda() for spec in session.inputs]
            torch.cuda.reset_peak_memory_stats()  # what loading took besides is not what running takes
            return _on_gpu(lambda: session(*tensors))

        return load

    return prepare


class _OnGpu:
    """Times calls in a row between two synchronisations, on a card that was busy before; the first calls compile and
    capture, and are not timed.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._calls, self._allocated = call, 3, 0

    def prepare(self) -> None:
        """The first calls; how many fill a timed run; the memory that they took."""
        import torch

        self._seconds(2)
        self._calls = max(3, math.ceil(GPU_RUN_SECONDS / self._seconds(1)))
        self._allocated = torch.cuda.max_memory_allocated()  # what warms the card up later is no part of the model

    def milliseconds(self) -> float:
        """Of one call."""
        from hqc.evaluation.bench import gpu_timing

        gpu_timing.spin_up()  # while the others had their turns the clocks went down
        self._seconds(1)
        return 1e3 * self._seconds(self._calls) / self._calls

    def output(self) -> NDArray[np.float32]:
        """On the CPU."""
        found: NDArray[np.float32] = self._call().float().cpu().numpy()
        return found

    def device_bytes(self) -> int:
        """The most that torch had allocated during the first calls."""
        return self._allocated

    def _seconds(self, calls: int) -> float:
        import torch

        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            self._call()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def _on_gpu(call: Callable[[], Any]) -> Loaded:
    timed = _OnGpu(call)
    return Loaded(timed.output, timed.milliseconds, timed.device_bytes, timed.prepare)


RUNTIMES: Mapping[str, Callable[[int], Callable[[Path, Arrays], Loaded]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "torch": _torch,
    "torch-compile": _torch_compile,
    "torch-int8": _torch_int8,
    "torch-cuda": _cuda("CudaSession"),
    "torch-cuda-int4": _cuda("CudaSession", weights="int4"),
    "torch-fp16-compile": _cuda("CompiledHalfSession", "compiled"),
    "torch-fp16-cudagraph": _cuda("HalfSession"),
}
"""Runtime -> what imports it and returns its loader; a further runtime is one entry."""


class Worker:
    """Answers the requests of the module's first lines."""

    def __init__(self) -> None:
        self._loaded: Loaded | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request, one answer."""
        if request["do"] == "load":
            return self._load(request)
        if request["do"] == "memory":
            device = 0 if self._loaded is None else self._loaded.device_bytes()
            resident, peak = resident_bytes(), peak_resident_bytes()
            return {"resident_bytes": resident, "peak_resident_bytes": peak, "device_bytes": device}
        if request["do"] == "stop":
            return {}
        if self._loaded is None:
            raise RuntimeError("no model is loaded")
        if request["do"] == "prepare":
            start = time.perf_counter()
            self._loaded.prepare()
            return {"seconds": time.perf_counter() - start}
        if request["do"] == "run":
            return {"milliseconds": self._loaded.milliseconds()}
        if request["do"] == "output":
            np.save(request["file"], self._loaded.output(), allow_pickle=False)
            return {}
        raise RuntimeError(f"unknown request {request['do']!r}")

    def _load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with np.load(request["inputs"], allow_pickle=False) as stored:
            inputs = {name: stored[name] for name in stored.files}
        load = RUNTIMES[request["runtime"]](request["threads"])
        before = resident_bytes()
        start = time.perf_counter()
        self._loaded = load(Path(request["model"]), inputs)
        seconds = time.perf_counter() - start
        return {
            "load_seconds": seconds,
            "runtime_resident_bytes": before,
            "loaded_resident_bytes": resident_bytes(),
            "notes": list(self._loaded.notes),
        }


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answers until the input ends or asks to stop."""
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        try:
            answer = worker.answer(request)
        except Exception as error:  # whatever a runtime raises is the parent's to report
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if request["do"] == "stop":
            return


def main() -> None:
    """Serves on the process's own pipes; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
