"""Quantisers with a scale for every group of neighbouring channels, stored for weights, of the moment for activations.

    dynamic    s = max(max|x|, 2⁻¹⁰⁰)/q over a group         of one token, or one pixel: nothing is calibrated
    codes      c = clip(round(x·(1/s)), qmin, qmax),  x̂ = s·c

`hqc::dynamic_scale` and `hqc::fake_quantize_grouped`; frozen `hqc::quantize_grouped` and `hqc::dequantize_grouped`.
Scales have the shape of x but for the axis of the channels, on which there is one for each group: a convolution's
weight has one for each tap. Where the group does not divide the channels, the last one is shorter; one that is larger
than they are holds them all.
A product of such codes is no integer product of whole rows: what is added up has a scale for every group.
Source: SVDQuant (arXiv 2411.05007), groups of 64.
"""

import torch
from torch import Tensor

__all__ = [
    "LEAST_REACH",
    "by_group",
    "dequantize_grouped",
    "dynamic_scale",
    "fake_quantize_grouped",
    "group_count",
    "quantize_grouped",
    "spread",
]

LEAST_REACH = 2.0**-100
"""The largest |value| of a group counts as this at least: a group of zeros keeps its zeros, and 1/s stays finite."""


def group_count(channels: int, group: int) -> int:
    """How many groups so many channels make, the last one perhaps shorter.

    >>> group_count(128, 64), group_count(100, 64), group_count(4, 64)
    (2, 2, 1)
    """
    return -(-channels // group)


def by_group(x: Tensor, axis: int, group: int) -> Tensor:
    """[…, C, …] as […, G, g, …], g at most C; a last group that is shorter is filled up with zeros."""
    axis %= x.ndim
    size = x.shape[axis]
    group = min(group, size)
    if missing := -size % group:
        filling = x.new_zeros([missing if at == axis else n for at, n in enumerate(x.shape)])
        x = torch.cat([x, filling], axis)
    return x.unflatten(axis, (-1, group))  # type: ignore[no-any-return,no-untyped-call]


def spread(scale: Tensor, x: Tensor, axis: int, group: int) -> Tensor:
    """The scales […, G, …] of x's groups in the shape of x."""
    size = x.shape[axis]
    return scale.repeat_interleave(min(group, size), axis).narrow(axis, 0, size)


def _scale_shape(x: Tensor, axis: int, group: int) -> list[int]:
    shape = list(x.shape)
    shape[axis] = group_count(shape[axis], group)
    return shape


def _codes(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    return (x * spread(scale.reciprocal(), x, axis, group)).round_().clamp_(qmin, qmax)


@torch.library.custom_op("hqc::dynamic_scale", mutates_args=())
def dynamic_scale(x: Tensor, qmax: int, axis: int, group: int) -> Tensor:
    """s […, G, …] = max(max|x|, 2⁻¹⁰⁰)/qmax over each group of x's channels; axis 1 or the last.

    No value is clipped: the largest one has the code ±qmax. NaN and infinity make NaN of their whole group's x̂.
    """
    inner = axis % x.ndim + 1
    return by_group(x.abs(), axis, group).amax(inner).clamp_min_(LEAST_REACH).div_(qmax).contiguous()


@dynamic_scale.register_fake
def _(x: Tensor, qmax: int, axis: int, group: int) -> Tensor:
    return torch.empty(_scale_shape(x, axis, group), dtype=x.dtype, device=x.device)


@torch.library.custom_op("hqc::fake_quantize_grouped", mutates_args=())
def fake_quantize_grouped(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    """x̂ = s·clip(round(x·(1/s)), qmin, qmax), one scale a group; half to even.

    scale [D0, …, G, …] > 0 in x's shape but for `axis`. There is no gradient: no step trains such sites.
    """
    return _codes(x, scale, qmin, qmax, axis, group).mul_(spread(scale, x, axis, group)).contiguous()


@fake_quantize_grouped.register_fake
def _(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("hqc::quantize_grouped", mutates_args=())
def quantize_grouped(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    """c = clip(round(x·(1/s)), qmin, qmax) as int8, one scale a group."""
    return _codes(x, scale, qmin, qmax, axis, group).to(torch.int8).contiguous()


@quantize_grouped.register_fake
def _(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@torch.library.custom_op("hqc::dequantize_grouped", mutates_args=())
def dequantize_grouped(q: Tensor, scale: Tensor, axis: int, group: int) -> Tensor:
    """x̂ = s·q in the scale's dtype, one scale a group; q integer."""
    return (q.to(scale.dtype) * spread(scale, q, axis, group)).contiguous()


@dequantize_grouped.register_fake
def _(q: Tensor, scale: Tensor, axis: int, group: int) -> Tensor:
    return torch.empty(q.shape, dtype=scale.dtype, device=q.device)
