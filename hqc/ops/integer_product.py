"""`hqc::int_linear` and `hqc::int_conv2d`: integer products with int32 results."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["int_conv2d", "int_linear"]

# The reference multiplies in float64, which holds every integer below 2^53: exact, and quick on a CPU.
_EXACT = torch.float64


@torch.library.custom_op("hqc::int_linear", mutates_args=())
def int_linear(q: Tensor, weight: Tensor, qmax: int) -> Tensor:
    """acc[…, o] = Σ_c q[…, c]·weight[o, c] in int32.

    q int8 […, C] with |q| ≤ qmax, weight int8 or int16 [O, C].  A pass has checked that max_o Σ|weight|·qmax < 2^31.
    `qmax` tells a lowering the unsigned zero point, qmax + 1.
    """
    return functional.linear(q.to(_EXACT), weight.to(_EXACT)).to(torch.int32)


@int_linear.register_fake
def _(q: Tensor, weight: Tensor, qmax: int) -> Tensor:
    return torch.empty((*q.shape[:-1], weight.shape[0]), dtype=torch.int32, device=q.device)


@torch.library.custom_op("hqc::int_conv2d", mutates_args=())
def int_conv2d(
    q: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    qmax: int,
) -> Tensor:
    """acc = conv2d(q, weight) in int32, padded with code 0; q int8 [N, C, H, W], weight int8 or int16 [O, C, h, w]."""
    return functional.conv2d(q.to(_EXACT), weight.to(_EXACT), None, list(stride), list(padding), list(dilation)).to(
        torch.int32
    )


@int_conv2d.register_fake
def _(
    q: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    qmax: int,
) -> Tensor:
    size = [
        (q.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return torch.empty((q.shape[0], weight.shape[0], *size), dtype=torch.int32, device=q.device)
