"""Sessions on a GPU: the integer one of the `torch-cuda` runtime, and the half-precision one it is timed against."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hqc.errors import EvaluationError, HqcError, MemoryShortError, RuntimeMissingError, is_memory_error
from hqc.kernels.cards import card_of
from hqc.kernels.guards import require_triton
from hqc.kernels.tuning import load_tuning, use
from hqc.program import InputSpec, Program
from hqc.runtimes.base import inputs_on
from hqc.runtimes.integer.build import BuildOptions, float_module, integer_module
from hqc.runtimes.integer.cuda.graphs import GRAPHS, Captured, GraphCache, Module, capture_cuda_graph
from hqc.runtimes.integer.forms import require_quantised
from hqc.runtimes.integer.kernel_set import triton_kernels
from hqc.runtimes.integer.report import BuildReport
from hqc.wording import first_words

__all__ = ["CudaSession", "HalfSession", "Precision", "Weights", "require_cuda", "require_gpu"]

NAME = "runtime torch-cuda"
Precision = Literal["fp16", "bf16", "fp32"]
Weights = Literal["int8", "int4"]
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_OLDEST = (8, 0)


class _GraphSession:
    """A module on a CUDA device, one CUDA graph a batch size. Calls from several threads and streams take turns."""

    name: str
    few_batches = True
    """A batch size that is new costs a capture: the server pads rows to a power of two."""

    def __init__(
        self,
        inputs: tuple[InputSpec, ...],
        module: nn.Module,
        device: torch.device,
        graphs: int,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """around: what a capture runs in; replays need nothing of it."""
        self.inputs, self.module, self.device = inputs, module, device
        pool = torch.cuda.graph_pool_handle()

        def capture(module: Module, inputs: tuple[Tensor, ...]) -> Captured:
            with around():
                return capture_cuda_graph(module, inputs, pool=pool)

        self._graphs = GraphCache(module, capture, limit=graphs)
        self._turn, self._done = threading.Lock(), torch.cuda.Event()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, timestep: Tensor | float | None = None, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        """See `Session`; the output is on the device if the sample is, else on the CPU."""
        given = inputs_on(self.device, self.inputs, sample, timestep, *conditions, **named)
        with self._turn, torch.cuda.device(self.device):
            # Another stream's replay may still be reading the static inputs that this call writes.
            self._done.wait()
            output = self._run(list(given.values()))
            self._done.record()
        return output if sample.is_cuda else output.cpu()

    def _run(self, inputs: list[Tensor]) -> Tensor:
        try:
            return self._graphs(inputs)
        except HqcError:
            raise
        except RuntimeError as error:  # kernels cannot say which node they belong to
            if is_memory_error(error):
                raise MemoryShortError(self.name, "the GPU has too little free memory", "Run fewer at once.") from error
            raise EvaluationError(
                self.name, f"cannot run the program ({first_words(error)})", "runtime='torch' names the node."
            ) from error


class CudaSession(_GraphSession):
    """Runs a quantised Program on a CUDA device: integer products in hqc's kernels, the rest in half precision.

    Weights are prepared once, on the device: int8, else two digits; with weights="int4" packed where |w_q·H| ≤ 127.
    Calls of one batch size replay one CUDA graph, whatever their timesteps.
    """

    name = "torch-cuda"

    def __init__(
        self,
        program: Program,
        *,
        dtype: Precision = "fp16",
        weights: Weights = "int8",
        tune: Literal["auto", "off"] | Path = "auto",
        graphs: int = GRAPHS,
        device: str = "cuda",
    ) -> None:
        """dtype: of activations between kernels and of float layers.

        weights: "int8" as the kernels multiply them, which is the quickest; "int4" keeps four-bit codes packed, in half
        the memory, and unpacks and rotates them in every call.
        tune: "auto" takes the tiles that `hqc tune` has kept for this card, a file those in it, "off" neither; the
        report says where tiles come from.
        graphs: how many batch sizes keep their CUDA graph.

        Raises:
            RuntimeMissingError: without triton, without a CUDA device of compute capability 8.0; for a float program;
                for an unknown dtype or form of weights.
            ExportError: for a site that the kernels cannot run.
        """
        require_quantised(program.stage)
        require_gpu()
        if weights not in get_args(Weights):
            raise RuntimeMissingError(NAME, f"has no weights {weights!r}", f"Use {', '.join(get_args(Weights))}.")
        options = BuildOptions(torch.device(device), _dtype(dtype), pack=weights == "int4")
        module = integer_module(program, triton_kernels(), options)
        table, tiles = load_tuning(tune, card_of(options.device))
        self.report: BuildReport = replace(module.meta["report"], tiles=tiles)
        super().__init__(program.inputs, module, options.device, graphs, partial(use, table))


class HalfSession(_GraphSession):
    """A float program in half precision with CUDA graphs and channels-last convolutions."""

    name = "torch-fp16-cudagraph"

    def __init__(
        self, program: Program, *, dtype: Precision = "fp16", graphs: int = GRAPHS, device: str = "cuda"
    ) -> None:
        """See `CudaSession`.

        Raises:
            RuntimeMissingError: without a CUDA device.
        """
        require_cuda()
        options = BuildOptions(torch.device(device), _dtype(dtype))
        super().__init__(program.inputs, float_module(program, options), options.device, graphs)


def require_cuda() -> None:
    """Refuses to go on without a CUDA device.

    Raises:
        RuntimeMissingError: saying whether torch or the machine lacks it.
    """
    if torch.cuda.is_available():
        return
    found = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
    raise RuntimeMissingError(NAME, found, "Use runtime='torch' or an onnxruntime export on this machine.")


def require_gpu() -> None:
    """Refuses to go on without a GPU that runs the kernels.

    Raises:
        RuntimeMissingError: without a CUDA device, with one that is too old, or without triton.
    """
    require_cuda()
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        found = f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}"
        raise RuntimeMissingError(NAME, f"{found}; the int8 kernels need 8.0", "Use runtime='torch'.")
    require_triton(NAME)


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise RuntimeMissingError(NAME, f"has no dtype {name!r}", f"Use {', '.join(get_args(Precision))}.")
    return _DTYPES[name]
