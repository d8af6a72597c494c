"""`hqc::fake_quantize_residual`: a quantiser with a second, binary code for what the first one leaves.

    x̂ = Q(x) + α·sign(x - Q(x)),  Q as `hqc::fake_quantize_bounded`

With α = mean|x - Q(x)| of a row the error of that row is least. Both terms are codes with a scale a row, so that a
product with x̂ is the sum of two integer products; α = 0 leaves Q(x) alone. Source: binary weights and their step from
XNOR-Net (arXiv 1603.05279); MPQ-DMv2 (arXiv 2507.04290) has them beside low-bit codes of salient channels.
"""

from typing import Any

import torch
from torch import Tensor

from hqc.ops.bounded import FakeQuantizeBounded, fake_quantize_bounded_backward
from hqc.ops.fake_quantize import per_first_axis

__all__ = ["FakeQuantizeResidual", "fake_quantize_residual"]


def _quantised(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    levels = x * per_first_axis(scale.reciprocal(), x)
    return levels.round_().clamp_(per_first_axis(low, x), per_first_axis(high, x)).mul_(per_first_axis(scale, x))


def _forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, step: Tensor) -> Tensor:
    base = _quantised(x, scale, low, high)
    return (x - base).sign_().mul_(per_first_axis(step, x)).add_(base)


def _step_gradient(grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    signs = (x - _quantised(x, scale, low, high)).sign_()
    return signs.mul_(grad).reshape(len(scale), -1).sum(1)


@torch.library.custom_op("hqc::fake_quantize_residual", mutates_args=())
def fake_quantize_residual(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, step: Tensor) -> Tensor:
    """x̂ = s·c + α·sign(x - s·c),  c = clip(round(x·(1/s)), low, high).

    x [D0, …]; scale > 0, low ≤ high (whole) and step α ≥ 0 [D0]: one of each per output channel of a weight.

    Gradients: those of `fake_quantize_bounded` to x, s and the bounds, as the sign is taken for constant;
    ∂x̂/∂α = sign(x - s·c).
    """
    return _forward(x, scale, low, high, step)


@fake_quantize_residual.register_fake
def _(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, step: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    grad = grad.contiguous()
    return (*fake_quantize_bounded_backward(grad, *ctx.saved_tensors), _step_gradient(grad, *ctx.saved_tensors))


fake_quantize_residual.register_autograd(_backward, setup_context=_setup_context)


class FakeQuantizeResidual(torch.autograd.Function):
    """The same function and gradients without the dispatcher, whose cost a call outweighs small tensors in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, step: Tensor) -> Tensor:  # type: ignore[override]
        """x̂; see `fake_quantize_residual`."""
        ctx.save_for_backward(x, scale, low, high)
        return _forward(x, scale, low, high, step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Gradients; see `fake_quantize_residual`."""
        bounded: tuple[Tensor, ...] = FakeQuantizeBounded.backward(ctx, grad)
        return *bounded, _step_gradient(grad, *ctx.saved_tensors)
