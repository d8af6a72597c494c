"""An engine in memory, and executions of it: one a batch size, each with its own shapes, all sharing scratch memory.

TensorRT and TensorRT-RTX have the same interface here, and their module is passed in. A context keeps its shapes: with
plugins ahead of time, TensorRT 11 loads a kernel anew at every change of shapes and keeps the old one, and without them
a change costs as much as several calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hqc.errors import ArtefactError, EvaluationError
from hqc.program import BATCH, InputSpec

__all__ = ["Engine", "Execution", "Port"]

_LEAST_SCRATCH = 256


@dataclass(frozen=True)
class Port:
    """An input or output: its type, its sizes (-1: the batch), the batches that it takes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    batches: tuple[int, int] | None = None

    def sizes(self, batch: int) -> tuple[int, ...]:
        """For a batch."""
        return tuple(batch if size < 0 else size for size in self.shape)


class Engine:
    """A plan that TensorRT has loaded."""

    def __init__(self, trt: Any, plan: bytes, where: str, do: str, device: torch.device) -> None:
        """where, do: for messages: the plan's file, and the command that builds it anew.

        Raises:
            ArtefactError: if TensorRT refuses it.
        """
        self._trt, self.device, self._where, self._do = trt, device, where, do
        self._log = _log_of(trt)
        self._log.errors.clear()
        self._runtime = trt.Runtime(self._log.logger)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ArtefactError(where, f"cannot be loaded ({self._log.first()})", do)
        self._engine = engine
        ports = [self._port(engine.get_tensor_name(i)) for i in range(engine.num_io_tensors)]
        modes = {port.name: engine.get_tensor_mode(port.name) for port in ports}
        self.inputs = {p.name: p for p in ports if modes[p.name] == trt.TensorIOMode.INPUT}
        self.outputs = {p.name: p for p in ports if modes[p.name] == trt.TensorIOMode.OUTPUT}
        self._scratch: Tensor | None = None

    def _port(self, name: str) -> Port:
        engine, trt = self._engine, self._trt
        kinds = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64}
        kind = engine.get_tensor_dtype(name).name
        if kind not in kinds:
            raise ArtefactError(self._where, f"takes or gives {kind} in {name}", self._do)
        shape = tuple(engine.get_tensor_shape(name))
        batches = None
        if -1 in shape and engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            low, _, high = (tuple(sizes) for sizes in engine.get_tensor_profile_shape(name, 0))
            batches = low[0], high[0]
        return Port(name, kinds[kind], shape, batches)

    @property
    def batches(self) -> tuple[int, int]:
        """The smallest and the largest that every input takes."""
        ranges = [port.batches for port in self.inputs.values() if port.batches is not None]
        if not ranges:
            fixed = self.inputs["sample"].shape[0]
            return fixed, fixed
        return max(low for low, _ in ranges), min(high for _, high in ranges)

    def check_inputs(self, specs: Sequence[InputSpec]) -> None:
        """Refuses an engine that does not take what the export's manifest says.

        Raises:
            ArtefactError: naming the input.
        """
        known = {spec.name: spec for spec in specs}
        for name, port in self.inputs.items():
            spec = known.get(name)
            if spec is None or not _fits(spec, port):
                raise ArtefactError(self._where, f"has an input {name} {list(port.shape)} of another model", self._do)

    def batch_of(self, inputs: Sequence[Tensor]) -> int:
        """The batch of a call with these inputs, in the order of the engine's."""
        sizes = [len(t) for p, t in zip(self.inputs.values(), inputs, strict=True) if p.batches is not None]
        return sizes[0] if sizes else self.batches[0]

    def check_batch(self, batch: int) -> None:
        """Refuses a batch outside of the profile.

        Raises:
            EvaluationError: naming the range and the command that widens it.
        """
        low, high = self.batches
        if not low <= batch <= high:
            option = f"--max-batch {batch}" if batch > high else f"--min-batch {batch}"
            raise EvaluationError(
                f"batch of {batch}",
                f"lies outside of the engine's {low}…{high}",
                f"{self._do.rstrip('.').rstrip('`')} {option}`.",
            )

    def execution(self, batch: int, output: str) -> "Execution":
        """A context for a batch size; what comes out of `output` is what a call gives.

        Raises:
            EvaluationError: for a batch outside of the profile.
            ArtefactError: if TensorRT refuses the shapes.
        """
        self.check_batch(batch)
        if output not in self.outputs:
            raise ArtefactError(self._where, f"has no output {output}", self._do)
        self._log.errors.clear()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise ArtefactError(self._where, f"cannot be run ({self._log.first()})", self._do)
        for name, port in self.inputs.items():
            if -1 in port.shape and not context.set_input_shape(name, port.sizes(batch)):
                raise ArtefactError(self._where, f"refuses {name} {list(port.sizes(batch))}", self._do)
        scratch = self._shared_scratch()
        context.set_device_memory(scratch.data_ptr(), scratch.numel())
        return Execution(context, self.inputs, self.outputs[output], batch, scratch)

    def _shared_scratch(self) -> Tensor:
        """One buffer for all contexts: their calls take turns."""
        if self._scratch is None:
            size = max(int(self._engine.device_memory_size_v2), _LEAST_SCRATCH)
            self._scratch = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._scratch


def _fits(spec: InputSpec, port: Port) -> bool:
    """Whether an input of the engine is the manifest's; a model may take one timestep a call."""
    shape = tuple(-1 if size == BATCH else size for size in spec.shape)
    alike = len(shape) == len(port.shape) and all(a in (b, -1) for a, b in zip(shape, port.shape, strict=True))
    return alike and port.dtype == getattr(torch, spec.dtype)


class Execution:
    """One context of an engine: `execution(*inputs)` on the current stream, nothing is copied.

    inputs: contiguous tensors in the order of the engine's, on its device.
    """

    def __init__(self, context: Any, inputs: Mapping[str, Port], output: Port, batch: int, scratch: Tensor) -> None:
        self._context, self._inputs, self._output, self._batch = context, inputs, output, batch
        self._scratch = scratch  # the context holds its address only

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output, in memory of its own, written once the stream has come to it.

        Raises:
            EvaluationError: if TensorRT refuses to launch.
        """
        output = torch.empty(self._output.sizes(self._batch), dtype=self._output.dtype, device=self._scratch.device)
        for port, tensor in zip(self._inputs.values(), inputs, strict=True):
            self._context.set_tensor_address(port.name, tensor.data_ptr())
        self._context.set_tensor_address(self._output.name, output.data_ptr())
        if not self._context.execute_async_v3(current_stream(self._scratch.device)):
            raise EvaluationError("engine", "TensorRT could not launch it", "See its messages above.")
        return output


def current_stream(device: torch.device) -> int:
    """The stream that torch works on, as TensorRT takes it."""
    return int(torch.cuda.current_stream(device).cuda_stream)


@cache
def _log_of(trt: Any) -> "_Log":
    """One a process: TensorRT keeps the first that it is given, and calls it for as long as the process lives."""
    return _Log(trt)


class _Log:
    """TensorRT's logger: errors are kept, the rest is left out."""

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        errors = self.errors

        class Logger(trt.ILogger):  # type: ignore[misc]  # a class of the module that is asked for
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity.name in ("ERROR", "INTERNAL_ERROR"):
                    errors.append(message)

        self.logger = Logger()

    def first(self) -> str:
        """The first error in one line, which the others follow from."""
        return " ".join(self.errors[0].split())[:300] if self.errors else "no reason was given"
