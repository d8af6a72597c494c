"""`hqc::fake_quantize_bounded` and `hqc::quantize_bounded`: quantisers whose least and largest code are tensors.

    textbook   q = clip(round(x/s) + z, 0, 2ⁿ-1),  x̂ = s·(q - z)
    here       c = q - z = clip(round(x/s), -z, 2ⁿ-1-z),  x̂ = s·c

Both give the same x̂: round(x/s) + z is exact. Codes c have no zero point: real 0 is code 0, whatever z is, so that
padding is exact, and an integer product of codes is the product of the real values up to the scales. For n ≤ 7 and z in
0…2ⁿ-1 they fit int8.
"""

from typing import Any

import torch
from torch import Tensor

from hqc.ops.fake_quantize import per_first_axis

__all__ = ["FakeQuantizeBounded", "fake_quantize_bounded", "quantize_bounded"]


def _codes(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    levels = x * per_first_axis(scale.reciprocal(), x)
    levels.round_()
    return _clip(levels, low, high, out=levels)


def _clip(levels: Tensor, low: Tensor, high: Tensor, out: Tensor | None = None) -> Tensor:
    """Samples of one timestep have the same bounds: as numbers they take a third of the time on a CPU."""
    if levels.device.type == "cpu" and _same(low) and _same(high):
        return torch.clamp(levels, float(low[0]), float(high[0]), out=out)
    return torch.clamp(levels, per_first_axis(low, levels), per_first_axis(high, levels), out=out)


def _same(values: Tensor) -> bool:
    return len(values) > 0 and bool((values == values[0]).all())


def _forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return _codes(x, scale, low, high).mul_(per_first_axis(scale, x))


def _gradients(
    grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    levels = x * per_first_axis(scale.reciprocal(), x)
    rounded = levels.round()
    codes = _clip(rounded, low, high)
    # Masks are 1.0 and 0.0: a product with bool is 20 times as slow.
    inside = torch.eq(rounded, codes, out=torch.empty_like(rounded))
    below = rounded.lt_(codes)
    grad_x = grad * inside
    slope = codes.addcmul_(levels, inside, value=-1).mul_(grad)
    outside = torch.sub(grad, grad_x, out=inside)

    def per_row(values: Tensor) -> Tensor:
        return values.reshape(len(scale), -1).sum(1)

    at_low, at_both = per_row(outside * below), per_row(outside)
    return grad_x, per_row(slope), at_low * scale, (at_both - at_low) * scale


@torch.library.custom_op("hqc::fake_quantize_bounded", mutates_args=())
def fake_quantize_bounded(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x̂ = s·clip(round(x·(1/s)), low, high), one scale and one pair of bounds per index of the first axis.

    x [D0, …], scale [D0] > 0, low ≤ high [D0] whole numbers: D0 is the batch for activations and the output channel for
    weights, as in `hqc::fake_quantize`, which is the case of the same bounds for all.  Rounding is half to even.

    Gradients (straight-through, LSQ): ∂x̂/∂x = 1 inside the range, 0 outside; ∂x̂/∂s = round(x/s) - x/s inside, low or
    high outside; ∂x̂/∂low = s where clipped below, ∂x̂/∂high = s where clipped above.
    Source: EfficientDM (arXiv 2310.03270), asymmetric quantisers; LSQ+ (arXiv 2004.09576).
    """
    return _forward(x, scale, low, high)


@fake_quantize_bounded.register_fake
def _(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("hqc::fake_quantize_bounded_backward", mutates_args=())
def fake_quantize_bounded_backward(
    grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `fake_quantize_bounded` to x [D0, …], scale, low and high [D0]."""
    return _gradients(grad, x, scale, low, high)


@fake_quantize_bounded_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return like_x, torch.empty_like(scale), torch.empty_like(scale), torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, scale, low, high = ctx.saved_tensors
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = fake_quantize_bounded_backward(
        grad.contiguous(), x, scale, low, high
    )
    return grads


fake_quantize_bounded.register_autograd(_backward, setup_context=_setup_context)


class FakeQuantizeBounded(torch.autograd.Function):
    """The same function and gradients without the dispatcher, whose cost a call outweighs small tensors in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:  # type: ignore[override]
        """x̂; see `fake_quantize_bounded`."""
        _setup_context(ctx, (x, scale, low, high), x)
        return _forward(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Gradients; see `fake_quantize_bounded`."""
        return _gradients(grad, *ctx.saved_tensors)


@torch.library.custom_op("hqc::quantize_bounded", mutates_args=())
def quantize_bounded(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """c = clip(round(x·(1/s)), low, high) as int8; x [D0, …], scale, low, high [D0], bounds whole in -128…127."""
    return _codes(x, scale, low, high).to(torch.int8)


@quantize_bounded.register_fake
def _(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)
