"""The `torch` runtime: a Program, or a module with a diffusers UNet's call, run by PyTorch on the CPU."""

from typing import Any

import torch
from torch import Tensor, nn

from hqc.program import BATCH, InputSpec, Program
from hqc.runtimes.base import named_inputs

__all__ = ["ModuleSession", "TorchSession"]


class TorchSession:
    """Runs a Program's own graph: the reference of every other runtime."""

    name = "torch"

    def __init__(self, program: Program) -> None:
        self.inputs = program.inputs
        self._module = program.module().eval()

    @torch.no_grad()
    def __call__(self, sample: Tensor, timestep: Tensor | float, condition: Tensor | None = None) -> Tensor:
        """See `Session`."""
        named = named_inputs(self.inputs, sample, timestep, condition)
        return self._module(*named.values())  # type: ignore[no-any-return]


class ModuleSession:
    """Runs a diffusers UNet as it is: the float model that a quantised one is measured against."""

    name = "torch"

    def __init__(self, unet: nn.Module, condition_length: int = 1) -> None:
        config: Any = unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = [InputSpec("sample", (BATCH, config.in_channels, height, width)), InputSpec("timestep", (BATCH,))]
        if (dim := config.get("cross_attention_dim")) is not None:
            inputs.append(InputSpec("condition", (BATCH, condition_length, dim if isinstance(dim, int) else dim[0])))
        self.inputs = tuple(inputs)
        self._unet = unet.eval()

    @torch.no_grad()
    def __call__(self, sample: Tensor, timestep: Tensor | float, condition: Tensor | None = None) -> Tensor:
        """See `Session`."""
        named = named_inputs(self.inputs, sample, timestep, condition)
        options = {"encoder_hidden_states": named["condition"]} if "condition" in named else {}
        return self._unet(named["sample"], named["timestep"], **options, return_dict=False)[0]  # type: ignore[no-any-return]
