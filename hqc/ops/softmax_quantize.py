"""`hqc::softmax_quantize`: the quantiser of a softmax, even steps or powers of two, as each sample's row says.

    even            c = clip(round(p·(1/s)), 0, 2ⁿ-1)                  p̂ = s·c
    powers of two   c = clip(round(-ln(p)·(1/ln 2)), 0, 2ⁿ-1)          p̂ = 2⁻ᶜ

Probabilities below 2⁻¹²⁶, the least normal float32, are taken as that: what runtimes do below it differs.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hqc.ops.fake_quantize import per_first_axis

__all__ = ["LEAST", "SoftmaxQuantize", "softmax_levels", "softmax_quantize", "softmax_values"]

LEAST = 2.0**-126
PER_OCTAVE = 1 / math.log(2)


def softmax_levels(p: Tensor, scale: Tensor, log2: Tensor) -> Tensor:
    """What is rounded to codes: p/s, or -log₂ p where log2 says so; p [N, …], scale and log2 [N]."""
    even = p * per_first_axis(scale.reciprocal(), p)
    powers = p.clamp_min(LEAST).log().mul_(-PER_OCTAVE)
    return torch.where(per_first_axis(log2, p) > 0.5, powers, even)


def softmax_values(codes: Tensor, scale: Tensor, log2: Tensor) -> Tensor:
    """The probabilities of codes, in float."""
    return torch.where(per_first_axis(log2, codes) > 0.5, torch.exp2(-codes), codes * per_first_axis(scale, codes))


def _forward(p: Tensor, scale: Tensor, log2: Tensor, bits: int) -> Tensor:
    return softmax_values(softmax_levels(p, scale, log2).round_().clamp_(0, 2**bits - 1), scale, log2)


def _gradients(grad: Tensor, p: Tensor, scale: Tensor, log2: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    levels = softmax_levels(p, scale, log2)
    rounded = levels.round()
    codes = rounded.clamp(0, 2**bits - 1)
    inside = (rounded == codes).to(grad.dtype)
    slope = (codes - levels * inside) * grad * (per_first_axis(log2, p) <= 0.5)
    return grad * inside, slope.reshape(len(scale), -1).sum(1)


@torch.library.custom_op("hqc::softmax_quantize", mutates_args=())
def softmax_quantize(p: Tensor, scale: Tensor, log2: Tensor, bits: int) -> Tensor:
    """p̂ of p [N, …] in 0…1 with 2ⁿ codes; scale [N] > 0 of even steps, log2 [N] 1 for powers of two, else 0.

    Rounding is half to even.  Gradients: ∂p̂/∂p = 1 where the code is not clipped, else 0 (straight-through);
    ∂p̂/∂s = round(p/s) - p/s inside, 2ⁿ-1 above, 0 for powers of two.
    Source: TCAQ-DM (arXiv 2412.16700); powers of two for softmax: FQ-ViT (arXiv 2111.13824).
    """
    return _forward(p, scale, log2, bits)


@softmax_quantize.register_fake
def _(p: Tensor, scale: Tensor, log2: Tensor, bits: int) -> Tensor:
    return torch.empty(p.shape, dtype=p.dtype, device=p.device)


@torch.library.custom_op("hqc::softmax_quantize_backward", mutates_args=())
def softmax_quantize_backward(grad: Tensor, p: Tensor, scale: Tensor, log2: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Gradients of `softmax_quantize` to p [N, …] and scale [N]."""
    return _gradients(grad, p, scale, log2, bits)


@softmax_quantize_backward.register_fake
def _(grad: Tensor, p: Tensor, scale: Tensor, log2: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return torch.empty(p.shape, dtype=p.dtype, device=p.device), torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bits = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    found: tuple[Tensor, Tensor] = softmax_quantize_backward(grad.contiguous(), *ctx.saved_tensors, ctx.bits)
    return *found, None, None


softmax_quantize.register_autograd(_backward, setup_context=_setup_context)


class SoftmaxQuantize(torch.autograd.Function):
    """The same function and gradients without the dispatcher, whose cost a call outweighs small tensors in training."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, scale: Tensor, log2: Tensor, bits: int) -> Tensor:  # type: ignore[override]
        """p̂; see `softmax_quantize`."""
        _setup_context(ctx, (p, scale, log2, bits), p)
        return _forward(p, scale, log2, bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        """Gradients; see `softmax_quantize`."""
        p, scale, log2 = ctx.saved_tensors
        return *_gradients(grad, p, scale, log2, ctx.bits), None, None
