"""The session of the `torch-int8` runtime: a quantised program on a CPU, integer products by oneDNN."""

import ctypes
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, fx

from hqc.memory import return_free_memory
from hqc.program import Program
from hqc.running import module_failure, run_module
from hqc.runtimes.base import named_inputs
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.cpu.attention import take_attention
from hqc.runtimes.integer.cpu.kernels import cpu_kernels
from hqc.runtimes.integer.cpu.operators import NAME, require_operators
from hqc.runtimes.integer.cpu.recordings import Recordings
from hqc.runtimes.integer.cpu.tape import Tape
from hqc.runtimes.integer.forms import require_quantised
from hqc.runtimes.integer.report import BuildReport
from hqc.stages import doing

__all__ = ["CpuSession"]


class CpuSession:
    """Runs a quantised Program on the CPU: integer products by oneDNN, everything else in float32, channels last.

    Weights are packed once, for this CPU. Where kernels are compiled code, a call is the `tape` of its shapes, else, or
    where they cannot be recorded, the graph runs node by node. Calls from several threads may run at the same time.
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
        found = cpu_kernels(cache)
        options = BuildOptions(torch.device("cpu"), torch.float32, side_stream=False, runtime=self.name)
        with doing("packing weights"):
            self._module = integer_module(program, found.kernels, options)
        if found.functions is not None:
            take_attention(self._module, found.functions)
        return_free_memory()  # codes as they were before they were packed
        self._recordings, against = _recordings(self._module, program, found.functions)
        calls = f"node by node ({against})" if against else "recorded for every shape"
        self.report: BuildReport = replace(self._module.meta["report"], tiles=f"{found.said}; calls: {calls}")
        self.inputs = program.inputs

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, timestep: Tensor | float | None = None, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        """See `Session`."""
        given = named_inputs(self.inputs, sample, timestep, *conditions, **named)
        tape = self.tape(*given.values())
        if tape is None:
            return run_module(self._module, *given.values())
        try:
            return tape(*given.values())
        except Exception as error:  # whatever an operator raises: the graph, run node by node, says which
            raise module_failure(self._module, tuple(given.values()), error) from error

    def tape(self, *inputs: Tensor) -> Tape | None:
        """What runs for inputs of their shapes, recorded now if it is not there; None where they run node by node."""
        return None if self._recordings is None else self._recordings.tape(inputs)


def _recordings(
    module: fx.GraphModule, program: Program, functions: ctypes.CDLL | None
) -> tuple[Recordings | None, str]:
    """The tapes of a module, or why there are none; inputs of the program's own shape are tried."""
    if functions is None:
        return None, "passes are plain torch"
    found = Recordings(module, functions)
    against = found.reason_against(program.example_inputs(2, seed=0))
    return (None if against else found), against
