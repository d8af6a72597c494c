"""What a runtime offers: a session that maps (sample, timestep, condition) to the denoiser's output."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.program import BATCH, InputSpec

__all__ = ["Session", "named_inputs"]


class Session(Protocol):
    """A loaded denoiser."""

    @property
    def name(self) -> str:
        """The runtime's name."""
        ...

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What it takes, in order."""
        ...

    def __call__(self, sample: Tensor, timestep: Tensor | float, condition: Tensor | None = None) -> Tensor:
        """sample [N, C, H, W], timestep scalar or [N], condition [N, L, D] or None -> [N, C', H, W] on the CPU.

        Raises:
            EvaluationError: if the inputs are not what the denoiser was captured for.
        """
        ...


def named_inputs(
    inputs: Sequence[InputSpec], sample: Tensor, timestep: Tensor | float, condition: Tensor | None
) -> dict[str, Tensor]:
    """The three arguments as contiguous float32 CPU tensors by name; a timestep for all becomes one a sample.

    Raises:
        EvaluationError: for a missing or superfluous condition, or a shape that does not fit.
    """
    names = [spec.name for spec in inputs]
    given = {"sample": sample, "timestep": _per_sample(timestep, len(sample)), "condition": condition}
    if extra := [n for n in names if n not in given]:
        raise EvaluationError(
            "denoiser", f"takes the input {extra[0]!r}, which a sampler does not have", "Call it itself."
        )
    if condition is not None and "condition" not in names:
        raise EvaluationError("condition", "the denoiser is unconditional", "Leave the condition out.")
    tensors = {}
    for spec in inputs:
        value = given[spec.name]
        if value is None:
            raise EvaluationError(spec.name, f"is missing; expected {list(spec.shape)}", "Give it.")
        _check_shape(spec, value, len(sample))
        tensors[spec.name] = value.detach().to("cpu", getattr(torch, spec.dtype)).contiguous()
    return tensors


def _per_sample(timestep: Tensor | float, count: int) -> Tensor:
    """A number, or a tensor of one or N -> [N] float32."""
    vector = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
    if len(vector) not in (1, count):
        raise EvaluationError("timestep", f"has {len(vector)} values for {count} samples", "Give one, or one a sample.")
    return vector.expand(count)


def _check_shape(spec: InputSpec, value: Tensor, batch: int) -> None:
    wanted = [batch if d == BATCH else d for d in spec.shape]
    if list(value.shape) != wanted:
        raise EvaluationError(
            spec.name,
            f"has shape {list(value.shape)}; expected {wanted}",
            "Give the shape that the denoiser was captured for.",
        )
