"""What a runtime offers: a session that maps (sample, timestep, conditions) to the denoiser's output.

A program without a timestep, as a half of an autoencoder, is called with the sample alone.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.program import BATCH, InputSpec

__all__ = ["Session", "inputs_on", "named_inputs"]


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

    def __call__(
        self, sample: Tensor, timestep: Tensor | float | None = None, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        """sample [N, …], timestep scalar or [N], conditions by name or in the order of `inputs` -> [N, …].

        The output is on the CPU; a session on a GPU leaves it there if the sample is there.

        Raises:
            EvaluationError: if the inputs are not what the denoiser was captured for.
        """
        ...


def named_inputs(
    inputs: Sequence[InputSpec],
    sample: Tensor,
    timestep: Tensor | float | None = None,
    *conditions: Tensor | None,
    **named: Tensor | None,
) -> dict[str, Tensor]:
    """`inputs_on` the CPU.

    Raises:
        EvaluationError: for a missing or superfluous input, or a shape that does not fit.
    """
    return inputs_on(torch.device("cpu"), inputs, sample, timestep, *conditions, **named)


def inputs_on(
    device: torch.device,
    inputs: Sequence[InputSpec],
    /,
    sample: Tensor,
    timestep: Tensor | float | None = None,
    *conditions: Tensor | None,
    **named: Tensor | None,
) -> dict[str, Tensor]:
    """The arguments as contiguous tensors by name, each in the dtype and shape of its `InputSpec`, in their order.

    A timestep, or any other condition [N], may be one value for all samples; what all samples share may have a leading
    axis of 1. Conditions without a name are those after `timestep`, in order; None leaves one out, for which an input
    that has a default is that.

    Raises:
        EvaluationError: for a missing or superfluous input, or a shape that does not fit.
    """
    names = [spec.name for spec in inputs]
    given: dict[str, Tensor | float | None] = {
        "sample": sample,
        "timestep": timestep,
        **_by_name(names, conditions),
    }
    for name, tensor in named.items():
        if tensor is None:
            continue
        if given.get(name) is not None:
            raise EvaluationError(name, "is given twice", "Give it once.")
        given[name] = tensor
    for name, value in given.items():
        if value is not None and name not in names:
            what = f"takes {', '.join(names)}; it was captured without {name}"
            raise EvaluationError(name, f"the denoiser {what}", "Leave it out, or capture the model with it.")
    return {spec.name: _fitted(spec, given.get(spec.name), len(sample), device) for spec in inputs}


def _by_name(names: Sequence[str], conditions: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """Conditions in order under their names; one beyond the last is an error only if it is not None."""
    free = [name for name in names if name not in ("sample", "timestep")]
    if any(value is not None for value in conditions[len(free) :]):
        if not free:
            raise EvaluationError("condition", "the denoiser is unconditional", "Leave the condition out.")
        raise EvaluationError(
            "denoiser", f"takes {len(free)} conditions ({', '.join(free)}) and was given more", "Leave the rest out."
        )
    return dict(zip(free, conditions, strict=False))


def _fitted(spec: InputSpec, value: Tensor | float | None, batch: int, device: torch.device) -> Tensor:
    """A value in the shape and dtype of its input, on the device."""
    wanted = [batch if d == BATCH else int(d) for d in spec.shape]
    value = spec.default if value is None else value
    if value is None:
        raise EvaluationError(spec.name, f"is missing; expected {list(spec.shape)}", "Give it.")
    dtype = getattr(torch, spec.dtype)
    tensor = torch.as_tensor(value).detach().to(device, dtype)
    if spec.shape == (BATCH,):
        return _per_sample(spec.name, tensor, batch)
    if not spec.batched and tensor.ndim == len(wanted) + 1 and len(tensor) == 1:
        tensor = tensor[0]
    if list(tensor.shape) != wanted:
        raise EvaluationError(
            spec.name,
            f"has shape {list(tensor.shape)}; expected {wanted}",
            "Give the shape that the denoiser was captured for.",
        )
    return tensor.contiguous()


def _per_sample(name: str, values: Tensor, count: int) -> Tensor:
    """One number or N of them -> [N]."""
    vector = values.reshape(-1)
    if len(vector) not in (1, count):
        raise EvaluationError(name, f"has {len(vector)} values for {count} samples", "Give one, or one a sample.")
    return vector.expand(count).contiguous()
