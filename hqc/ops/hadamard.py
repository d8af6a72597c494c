"""`hqc::hadamard`: block-diagonal normalised Hadamard rotation of one axis."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Hadamard", "block_size", "hadamard", "sylvester"]

SMALLEST_BLOCK = 8
_FEW_COLUMNS = 16


@lru_cache(maxsize=32)
def sylvester(order: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Sylvester's Hadamard matrix H of a power-of-two order, entries ±1.

    H_1 = [1];  H_2n = [[H_n, H_n], [H_n, -H_n]].  H = Hᵀ and H·H = order·I.
    """
    if order < 1 or order & (order - 1):
        raise ValueError(f"sylvester: the order is {order}; expected a power of two")
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def block_size(channels: int, wanted: int) -> int:
    """The block that fits: `wanted` if it divides `channels`, else the largest power of two ≥ 8 that does, else 0.

    >>> block_size(320, 32), block_size(48, 32), block_size(3, 32)
    (32, 16, 0)
    """
    block = wanted
    while block >= SMALLEST_BLOCK:
        if channels % block == 0:
            return block
        block //= 2
    return 0


def _rotate(x: Tensor, block: int, axis: int) -> Tensor:
    axis %= x.ndim
    matrix = sylvester(block, x.dtype, str(x.device))
    if axis == x.ndim - 1:
        return (x.reshape(-1, block) @ matrix).mul_(block**-0.5).view(x.shape)
    if axis != 1:
        raise ValueError(f"hqc::hadamard: axis {axis} of {x.ndim}; expected 1 or the last")
    inner = math.prod(x.shape[2:])
    if inner < _FEW_COLUMNS:
        # Products with so few columns cost more than laying the channels last and back.
        last = x.reshape(x.shape[0], x.shape[1], inner).transpose(1, 2)
        rotated = (last.reshape(-1, block) @ matrix).mul_(block**-0.5)
        return rotated.view(last.shape).transpose(1, 2).contiguous().view(x.shape)
    groups = x.reshape(-1, block, inner)
    return torch.matmul(matrix, groups).mul_(block**-0.5).view(x.shape)


@torch.library.custom_op("hqc::hadamard", mutates_args=())
def hadamard(x: Tensor, block: int, axis: int) -> Tensor:
    """Rotates `axis` of x by Ĥ = H_block/√block, block by block; its own inverse.

    y[…, g·b + i, …] = Σ_j H[i, j]·x[…, g·b + j, …] / √b,  same shape as x.
    The sum over ±x runs first and the factor 1/√b is applied last, as every export does, so that both sides
    round alike.  Source: HQ-DM (arXiv 2512.05746), single Hadamard transformation.
    """
    return _rotate(x, block, axis)


@hadamard.register_fake
def _(x: Tensor, block: int, axis: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block, ctx.axis = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return hadamard(grad.contiguous(), ctx.block, ctx.axis), None, None


hadamard.register_autograd(_backward, setup_context=_setup_context)


class Hadamard(torch.autograd.Function):
    """The same rotation without the dispatcher, whose cost a call outweighs small tensors in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, axis: int) -> Tensor:  # type: ignore[override]
        """y = Ĥ·x; see `hadamard`."""
        ctx.block, ctx.axis = block, axis
        return _rotate(x, block, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Ĥ·grad: the rotation is symmetric."""
        return _rotate(grad, ctx.block, ctx.axis), None, None
