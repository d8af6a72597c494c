"""The session of the `torch-int8` runtime: a quantised program on a CPU, integer products by oneDNN."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hqc.memory import return_free_memory
from hqc.program import Program
from hqc.running import run_module
from hqc.runtimes.base import named_inputs
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.cpu.kernels import cpu_kernels
from hqc.runtimes.integer.cpu.operators import NAME, require_operators
from hqc.runtimes.integer.forms import require_quantised
from hqc.runtimes.integer.report import BuildReport
from hqc.stages import doing

__all__ = ["CpuSession"]


class CpuSession:
    """Runs a quantised Program on the CPU: integer products by oneDNN, everything else in float32, channels last.

    Weights are packed once, for this CPU. Calls from several threads may run at the same time.
    """

    name = NAME.removeprefix("runtime ")

    def __init__(self, program: Program, *, cache: Path | None = None) -> None:
        """cache: of the passes that are compiled for this CPU; None is the user's own cache folder.

        Raises:
            RuntimeMissingError: without oneDNN's operators; for a float program.
            ExportError: for a site that the products cannot run.
        """
        require_quantised(program.stage, self.name)
        require_operators()
        kernels, said = cpu_kernels(cache)
        options = BuildOptions(torch.device("cpu"), torch.float32, side_stream=False, runtime=self.name)
        with doing("packing weights"):
            self._module = integer_module(program, kernels, options)
        return_free_memory()  # codes as they were before they were packed
        self.report: BuildReport = replace(self._module.meta["report"], tiles=said)
        self.inputs = program.inputs

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, timestep: Tensor | float | None = None, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        """See `Session`."""
        given = named_inputs(self.inputs, sample, timestep, *conditions, **named)
        return run_module(self._module, *given.values())
