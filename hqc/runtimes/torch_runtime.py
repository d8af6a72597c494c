"""The `torch` runtime: a Program, or a diffusers denoiser, run by PyTorch on the CPU."""

import torch
from torch import Tensor, nn

from hqc.capture.diffusers_models import denoiser_source
from hqc.program import Program
from hqc.running import run_module
from hqc.runtimes.base import named_inputs

__all__ = ["ModuleSession", "TorchSession"]


class TorchSession:
    """Runs a Program's own graph: the reference of every other runtime."""

    name = "torch"

    def __init__(self, program: Program) -> None:
        self.inputs = program.inputs
        self._module = program.module().eval()

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, timestep: Tensor | float | None = None, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        """See `Session`."""
        given = named_inputs(self.inputs, sample, timestep, *conditions, **named)
        return run_module(self._module, *given.values())


class ModuleSession:
    """Runs a diffusers denoiser as it is: the float model that a quantised one is measured against."""

    name = "torch"

    def __init__(self, denoiser: nn.Module, condition_length: int = 1) -> None:
        source = denoiser_source(denoiser, "", condition_length=condition_length)
        self.inputs = source.inputs
        self._module = source.module.eval()

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, timestep: Tensor | float | None = None, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        """See `Session`."""
        given = named_inputs(self.inputs, sample, timestep, *conditions, **named)
        return run_module(self._module, *given.values())
