"""`hqc::fake_quantize`: quantise and dequantise in floating point, with gradients to the value and the scale."""

import torch
from torch import Tensor

__all__ = ["fake_quantize"]


def per_first_axis(scale: Tensor, x: Tensor) -> Tensor:
    """scale [D0] shaped to broadcast over x [D0, …]."""
    return scale.view(-1, *[1] * (x.ndim - 1))


@torch.library.custom_op("hqc::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """x̂ = s·clip(round(x·(1/s)), qmin, qmax), one scale per index of the first axis.

    x [D0, …], scale [D0] > 0: D0 is the batch for activations (a scale per sample, looked up from its timestep) and the
    output channel for weights.  Rounding is half to even.

    Gradients (straight-through, LSQ): ∂x̂/∂x = 1 inside the range, 0 outside; ∂x̂/∂s = round(x/s) - x/s inside,
    qmin or qmax outside, so that clipped values still move the scale.  Source: HQ-DM §QAT; LSQ (arXiv 1902.08153).
    """
    zero_point = torch.zeros_like(scale)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, 0, qmin, qmax)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("hqc::fake_quantize_backward", mutates_args=())
def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `fake_quantize` to x [D0, …] and scale [D0]."""
    inverse = per_first_axis(scale.reciprocal(), x)
    level = x * inverse
    rounded = level.round().clamp_(qmin, qmax)
    clipped = (level < qmin - 0.5) | (level > qmax + 0.5)
    slope = torch.where(clipped, rounded, rounded - level)
    return grad.masked_fill(clipped, 0.0), (grad * slope).flatten(1).sum(1)


@fake_quantize_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, scale, ctx.qmin, ctx.qmax = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, scale = ctx.saved_tensors
    return *fake_quantize_backward(grad.contiguous(), x, scale, ctx.qmin, ctx.qmax), None, None


fake_quantize.register_autograd(_backward, setup_context=_setup_context)
