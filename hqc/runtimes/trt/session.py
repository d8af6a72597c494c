"""The `tensorrt` runtime: an export's engine, run by TensorRT or TensorRT-RTX on a GPU."""

import importlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqc.engines.builders import TRT, Builder
from hqc.errors import ArtefactError, RuntimeMissingError
from hqc.export.artefact import EXPORT_KIND
from hqc.export.lowering import OUTPUT
from hqc.paths import StrPath
from hqc.plan import QuantPlan
from hqc.plugins import register
from hqc.program import InputSpec
from hqc.runtimes.base import inputs_on
from hqc.runtimes.integer.cuda.graphs import GRAPHS, Captured, GraphCache, capture_cuda_graph
from hqc.runtimes.trt.engine import Engine
from hqc.runtimes.trt.plans import ELSEWHERE, NAME, TARGET, PlanOptions, find_gpu, find_plan, needs_plugins
from hqc.runtimes.unet import SessionUNet, as_unet
from hqc.storage import check_manifest

__all__ = ["TensorRtSession"]

log = logging.getLogger(__name__)

Runner = Callable[[Sequence[Tensor]], Tensor]


class TensorRtSession:
    """Runs the engine of an export for TensorRT, loaded for the GPU here, or built once if there is none.

    Inputs on the GPU are used where they lie, others are copied there; the output stays there if the sample was there.
    Calls of one batch size replay one CUDA graph, whatever their timesteps: scales are looked up in the engine. Calls
    from several threads take turns.
    """

    name = "tensorrt"
    few_batches = True
    """A batch size that is new costs an execution context and a capture: the server pads rows to a power of two."""

    def __init__(
        self, folder: StrPath, options: PlanOptions | None = None, *, graphs: int = GRAPHS, device: int = 0
    ) -> None:
        """graphs: how many batch sizes keep their CUDA graph, 0 for none. device: the number of the GPU.

        Raises:
            RuntimeMissingError: if the driver, a GPU, TensorRT, or a torch built with CUDA is missing.
            ArtefactError: if the folder is not such an export, or its plan is of another version, card or profile,
                or damaged.
            ExportError: if the engine cannot be built.
        """
        gpu = find_gpu(device)
        _require_cuda()
        self.device = _device(device)
        self.folder = Path(folder)
        self._manifest = check_manifest(self.folder, EXPORT_KIND)
        if self._manifest.get("target") != TARGET:
            raise ArtefactError(
                str(folder), f"is an export for {self._manifest.get('target')!r}", "Export with --target tensorrt."
            )
        self.inputs = _inputs(self.folder, self._manifest)
        builder, plan = find_plan(self.folder, self._manifest, gpu, options or PlanOptions(), on_build=_say)
        self.record = plan.record
        trt = _module(builder)
        if needs_plugins(self._manifest) and not hasattr(trt, "QuickPluginCreationRequest"):
            register(self.folder)  # before TensorRT 10.9 an engine does not hold its plugins' kernels
        command = f"Run `hqc build-engine {folder} --engine {builder.name} --force`."
        self._engine = Engine(trt, plan.data, str(self.folder / plan.record.file), command, self.device)
        self._engine.check_inputs(self.inputs)
        # TensorRT-RTX compiles kernels for new shapes while it runs, which a capture would not survive.
        self._run = runner(self._engine, graphs if builder is TRT else 0)
        self._turn = threading.Lock()

    @property
    def batches(self) -> tuple[int, int]:
        """The smallest and the largest batch of a call."""
        return self._engine.batches

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, timestep: Tensor | float | None = None, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        """See `Session`; the output is on the GPU if the sample is, else on the CPU.

        Raises:
            EvaluationError: for a batch outside of the engine's range, or inputs that do not fit.
        """
        self._engine.check_batch(len(sample))
        given = inputs_on(self._engine.device, self.inputs, sample, timestep, *conditions, **named)
        feeds = {name: given[name] for name in self._engine.inputs}
        with self._turn:
            output = self._each_timestep(feeds) if self.one_timestep else self._run(list(feeds.values()))
        return output if sample.device == output.device else output.to(sample.device)

    @property
    def one_timestep(self) -> bool:
        """Whether the model takes one timestep a call."""
        port = self._engine.inputs.get("timestep")
        return port is not None and port.shape == (1,)

    def _each_timestep(self, feeds: dict[str, Tensor]) -> Tensor:
        """One run for every timestep of the batch."""
        times = feeds["timestep"]
        output: Tensor | None = None
        for time in torch.unique(times):
            rows = (times == time).nonzero().flatten()
            part = {name: tensor[rows] if _batched(self.inputs, name) else tensor for name, tensor in feeds.items()}
            found = self._run([value.contiguous() for value in {**part, "timestep": time.reshape(1)}.values()])
            output = found.new_empty((len(times), *found.shape[1:])) if output is None else output
            output[rows] = found
        assert output is not None
        return output

    def as_unet(self) -> SessionUNet:
        """The engine as a drop-in for a diffusers pipeline's `.unet` or `.transformer`.

        Raises:
            ArtefactError: if the export's plan cannot be read.
        """
        try:
            plan = QuantPlan.from_dict(json.loads((self.folder / "plan.json").read_text(encoding="utf-8")))
            config = dict(self._manifest["origin"]["unet_config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(str(self.folder), f"is not an export ({error})", "Export it again.") from error
        return as_unet(self, config, timesteps=plan.timesteps)


# ---- running -------------------------------------------------------------------------------------------------------


def runner(engine: Engine, graphs: int) -> Runner:
    """CUDA graphs, at most `graphs` of them, or launches on a stream of its own."""
    if not graphs:
        return _Launches(engine)
    return _Replays(engine, graphs)


class _Launches:
    """Runs contexts, at most `limit` batch sizes, on a stream of its own: TensorRT synchronises on the default one."""

    def __init__(self, engine: Engine, limit: int = GRAPHS) -> None:
        self._engine, self._limit = engine, limit
        self._executions: OrderedDict[int, Any] = OrderedDict()
        self._stream = torch.cuda.Stream(engine.device)  # type: ignore[no-untyped-call]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        batch = self._engine.batch_of(inputs)
        if batch not in self._executions:
            while len(self._executions) >= self._limit:
                self._stream.synchronize()  # what is dropped may still run
                self._executions.popitem(last=False)
            self._executions[batch] = self._engine.execution(batch, OUTPUT)
        self._executions.move_to_end(batch)
        current = torch.cuda.current_stream(self._engine.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output: Tensor = self._executions[batch](*inputs)
        for tensor in (*inputs, output):
            tensor.record_stream(self._stream if tensor is not output else current)
        current.wait_stream(self._stream)
        return output


class _Replays:
    """Captures each batch size once and replays it; its context lives as long as its graph."""

    def __init__(self, engine: Engine, graphs: int) -> None:
        self._engine = engine
        self._cache = GraphCache(_never, self._capture, limit=graphs)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        with torch.cuda.device(self._engine.device):
            self._done.wait()  # another stream's replay may still read the static inputs
            output = self._cache(inputs)
            self._done.record()
        return output

    def _capture(self, _: Any, inputs: tuple[Tensor, ...]) -> Captured:
        batch = self._engine.batch_of(inputs)
        execution = self._engine.execution(batch, OUTPUT)
        captured = capture_cuda_graph(execution, inputs)
        return replace(captured, replay=partial(_with, execution, captured.replay))


def _never(*_: Tensor) -> Tensor:
    raise AssertionError("every batch size has a context of its own")


def _with(kept: Any, replay: Callable[[], None]) -> None:
    """Replays; holds what the graph reads."""
    replay()


# ---- what is needed ------------------------------------------------------------------------------------------------


def _require_cuda() -> None:
    if torch.cuda.is_available():
        return
    found = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
    raise RuntimeMissingError(NAME, found, ELSEWHERE)


def _device(index: int) -> torch.device:
    return torch.device("cuda", index)


def _module(builder: Builder) -> Any:
    try:
        return importlib.import_module(builder.module)
    except (ImportError, OSError) as error:
        raise RuntimeMissingError(NAME, f"{builder.module} cannot be imported ({error})", builder.install) from error


def _inputs(folder: Path, manifest: dict[str, Any]) -> tuple[InputSpec, ...]:
    try:
        return tuple(InputSpec.from_dict(spec) for spec in manifest["inputs"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(str(folder), f"has a manifest without inputs ({error})", "Export it again.") from error


def _batched(specs: Sequence[InputSpec], name: str) -> bool:
    return next(spec.batched for spec in specs if spec.name == name)


def _say(what: str) -> None:
    log.warning("building an engine with %s, once: this takes minutes", what)
