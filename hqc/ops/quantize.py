"""`hqc::quantize` and `hqc::dequantize`: between real values and integer codes."""

import torch
from torch import Tensor

from hqc.ops.fake_quantize import per_first_axis

__all__ = ["dequantize", "quantize"]


@torch.library.custom_op("hqc::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """q = clip(round(x·(1/s)), qmin, qmax) as int8; x [D0, …], scale [D0], half to even."""
    return (x * per_first_axis(scale.reciprocal(), x)).round_().clamp_(qmin, qmax).to(torch.int8)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@torch.library.custom_op("hqc::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """x̂ = s·q in the scale's dtype; q [D0, …] integer, scale [D0]."""
    return q.to(scale.dtype) * per_first_axis(scale, q)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=scale.dtype, device=q.device)
