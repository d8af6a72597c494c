"""`hqc::round_ste`: rounding that gradients pass through."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["RoundSte", "round_ste"]


@torch.library.custom_op("hqc::round_ste", mutates_args=())
def round_ste(x: Tensor) -> Tensor:
    """y = round(x), half to even, of x's shape.

    Gradient: ∂y/∂x = 1 (straight-through), so that what must be whole can be trained.  Source: arXiv 1308.3432.
    """
    return x.round()


@round_ste.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad


round_ste.register_autograd(_backward, setup_context=_setup_context)


class RoundSte(torch.autograd.Function):
    """The same rounding without the dispatcher, whose cost a call outweighs small tensors in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        """round(x); see `round_ste`."""
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """grad as it is."""
        return grad
