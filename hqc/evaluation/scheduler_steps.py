"""Every step of a pipeline's scheduler, seen and changed from outside: the guided ε that goes in, the x that comes out.

Guidance is combined before the scheduler is called, whatever the pipeline; so no pipeline has to be known here.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor

from hqc.errors import EvaluationError
from hqc.sampling.task import noise_only

__all__ = ["OnLatents", "OnNoise", "changed_steps"]

OnNoise = Callable[[float, Tensor], Tensor]
"""(timestep, what the denoiser predicts, guided [N, …]) -> what the scheduler is given instead."""

OnLatents = Callable[[Tensor], Tensor]
"""x after a step [N, …] -> what the pipeline goes on with instead."""

_TAKEN = ("model_output", "timestep", "sample")


@contextmanager
def changed_steps(
    scheduler: Any,
    *,
    noise: OnNoise = lambda timestep, predicted: predicted,
    latents: OnLatents = lambda x: x,
) -> Iterator[None]:
    """While inside, every `scheduler.step` of diffusers goes through `noise` and `latents`; afterwards it is as before.

    A learned variance behind the noise stays as it is. Pipelines that ask for the signature of `step` get its own.

    Raises:
        EvaluationError: if the scheduler has no step of diffusers' form.
    """
    step, own = getattr(scheduler, "step", None), vars(scheduler).get("step")
    signature = inspect.signature(step) if callable(step) else inspect.Signature()
    if step is None or any(name not in signature.parameters for name in _TAKEN):
        raise EvaluationError(
            type(scheduler).__name__,
            f"has no step({', '.join(_TAKEN)}, …), where ε and x_t are seen",
            "Take a scheduler of diffusers, or leave the trajectory's figures out.",
        )

    @wraps(step)
    def changed(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        values = given.arguments
        values["model_output"] = _with_noise(noise, float(values["timestep"]), values["model_output"], values["sample"])
        return _with_latents(latents, step(*given.args, **given.kwargs))

    scheduler.step = changed
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


def _with_noise(change: OnNoise, timestep: float, output: Tensor, sample: Tensor) -> Tensor:
    whole = output.clone()
    part = noise_only(whole, sample)  # a view
    part.copy_(change(timestep, noise_only(output, sample)))
    return whole


def _with_latents(change: OnLatents, result: Any) -> Any:
    """A scheduler's result, a tuple or an output with `prev_sample`, with x replaced."""
    if isinstance(result, tuple):
        return (change(result[0]), *result[1:])
    result.prev_sample = change(result.prev_sample)
    return result
