"""`hqc::fake_quantize`: quantise and dequantise in floating point, with gradients to the value and the scale."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["FakeQuantize", "fake_quantize", "per_first_axis"]


def per_first_axis(scale: Tensor, x: Tensor) -> Tensor:
    """scale [D0] shaped to broadcast over x [D0, …]."""
    return scale.view(-1, *[1] * (x.ndim - 1))


def _forward(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    levels = x * per_first_axis(scale.reciprocal(), x)
    return levels.round_().clamp_(qmin, qmax).mul_(per_first_axis(scale, x))


def _gradients(grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    levels = x * per_first_axis(scale.reciprocal(), x)
    rounded = levels.round()
    codes = rounded.clamp(qmin, qmax)
    inside = rounded.eq_(codes)  # 1 inside the range, 0 where the code was clipped
    grad_x = grad * inside
    slope = codes.addcmul_(levels, inside, value=-1)
    return grad_x, slope.mul_(grad).reshape(len(scale), -1).sum(1)


@torch.library.custom_op("hqc::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """x̂ = s·clip(round(x·(1/s)), qmin, qmax), one scale per index of the first axis.

    x [D0, …], scale [D0] > 0: D0 is the batch for activations (a scale per sample, looked up from its timestep) and the
    output channel for weights.  Rounding is half to even.

    Gradients (straight-through, LSQ): ∂x̂/∂x = 1 inside the range, 0 outside; ∂x̂/∂s = round(x/s) - x/s inside,
    qmin or qmax outside, so that clipped values still move the scale.  Source: HQ-DM §QAT; LSQ (arXiv 1902.08153).
    """
    return _forward(x, scale, qmin, qmax)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("hqc::fake_quantize_backward", mutates_args=())
def fake_quantize_backward(grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Gradients of `fake_quantize` to x [D0, …] and scale [D0]."""
    return _gradients(grad, x, scale, qmin, qmax)


@fake_quantize_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, ctx.qmin, ctx.qmax = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, scale = ctx.saved_tensors
    return *fake_quantize_backward(grad.contiguous(), x, scale, ctx.qmin, ctx.qmax), None, None


fake_quantize.register_autograd(_backward, setup_context=_setup_context)


class FakeQuantize(torch.autograd.Function):
    """The same function and gradients without the dispatcher, whose cost a call outweighs small tensors in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:  # type: ignore[override]
        """x̂; see `fake_quantize`."""
        _setup_context(ctx, (x, scale, qmin, qmax), x)
        return _forward(x, scale, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        """Gradients; see `fake_quantize`."""
        x, scale = ctx.saved_tensors
        return *_gradients(grad, x, scale, ctx.qmin, ctx.qmax), None, None
