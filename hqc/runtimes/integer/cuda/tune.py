"""The products of a program on this GPU, measured: what `hqc tune` does."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from hqc.claims import claimed
from hqc.kernels.calls import Recorder, Work
from hqc.kernels.cards import card_of
from hqc.kernels.measuring import TuningReport, tune
from hqc.kernels.precompile import instead_of_launching
from hqc.kernels.timing import cuda_timer
from hqc.kernels.tuning import tuning_file
from hqc.program import Program
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.cuda.session import Precision, Weights, _dtype, require_gpu
from hqc.runtimes.integer.forms import require_quantised
from hqc.runtimes.integer.kernel_set import Kernels, triton_kernels

__all__ = ["products_of", "tune_program"]

DEVICE = "cuda"


def tune_program(
    program: Program,
    batch_sizes: Sequence[int],
    *,
    dtype: Precision = "fp16",
    weights: Weights = "int8",
    output: Path | None = None,
    limit_seconds: float | None = None,
    on_product: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> TuningReport:
    """Measures the tiles of a program's products at some batch sizes, and keeps the quickest for `CudaSession`.

    dtype, weights: as `CudaSession` has them.  output: the file, by default the one that sessions look for.

    Raises:
        RuntimeMissingError: without triton, without a CUDA device of compute capability 8.0; for a float program.
        ExportError: for a site that the kernels cannot run.
        ArtefactError: if the file cannot be written, or another run is writing it.
    """
    require_quantised(program.stage)
    require_gpu()
    options = BuildOptions(torch.device(DEVICE), _dtype(dtype), pack=weights == "int4")
    on_product(0, 0, "reading the program")
    works = products_of(program, batch_sizes, triton_kernels(), options)
    card = card_of(options.device)

    def advance(done: int, note: str) -> None:
        on_product(done, len(works), note)

    with torch.cuda.device(options.device), cuda_timer(options.device) as timer:
        path = tuning_file(card) if output is None else output
        with claimed(path, force=True):
            return tune(works, timer, card, path, limit_seconds=limit_seconds, on_product=advance)


@torch.no_grad()
def products_of(program: Program, batch_sizes: Sequence[int], kernels: Kernels, options: BuildOptions) -> list[Work]:
    """The products that a program's module computes at these batch sizes; its kernels do not run."""
    recorder = Recorder()
    products: dict[str, Any] = {
        f.name: recorder.wrap(getattr(kernels, f.name)) for f in fields(kernels) if f.name.startswith("int_")
    }
    module = integer_module(program, replace(kernels, **products), options)
    for size in batch_sizes:
        inputs = [tensor.to(options.device) for tensor in program.example_inputs(size, seed=0)]
        with instead_of_launching():
            module(*inputs)
    return recorder.work()
