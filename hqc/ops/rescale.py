"""`hqc::rescale`: integer accumulators back to real units."""

import torch
from torch import Tensor

__all__ = ["rescale"]


@torch.library.custom_op("hqc::rescale", mutates_args=())
def rescale(
    acc: Tensor, scale_activation: Tensor, scale_weight: Tensor, bias: Tensor | None, channel_axis: int
) -> Tensor:
    """y = acc·scale_weight[c]·scale_activation[n] + bias[c], in float32.

    acc int32 [N, …] with output channels on `channel_axis` (1 for images, -1 for tokens), scale_activation [N],
    scale_weight [O] (with the rotation's 1/√b already in it), bias [O] or None.
    Source: design, integer form: Y = (s_a(t)·s_w/√b)·int_op(q_a, q_w·H_b) + bias.
    """
    channels = [1] * acc.ndim
    channels[channel_axis] = -1
    y = acc.to(torch.float32).mul_(scale_weight.view(channels))
    y.mul_(scale_activation.view(-1, *[1] * (acc.ndim - 1)))
    return y if bias is None else y.add_(bias.view(channels))


@rescale.register_fake
def _(acc: Tensor, scale_activation: Tensor, scale_weight: Tensor, bias: Tensor | None, channel_axis: int) -> Tensor:
    return torch.empty(acc.shape, dtype=torch.float32, device=acc.device)
