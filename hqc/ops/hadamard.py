"""`hqc::hadamard`: block-diagonal normalised Hadamard rotation of one axis."""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["block_size", "hadamard", "sylvester"]

SMALLEST_BLOCK = 8


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


@torch.library.custom_op("hqc::hadamard", mutates_args=())
def hadamard(x: Tensor, block: int, axis: int) -> Tensor:
    """Rotates `axis` of x by Ĥ = H_block/√block, block by block; its own inverse.

    y[…, g·b + i, …] = Σ_j H[i, j]·x[…, g·b + j, …] / √b,  same shape as x.
    The sum over ±x runs first and the factor 1/√b is applied last, as every export does, so that both sides
    round alike.  Source: HQ-DM (arXiv 2512.05746), single Hadamard transformation.
    """
    axis %= x.ndim
    matrix = sylvester(block, x.dtype, str(x.device))
    if axis == x.ndim - 1:
        return (x.reshape(-1, block) @ matrix).mul_(block**-0.5).view(x.shape)
    groups = x.reshape(-1, block, x[0].numel() // x.shape[1]) if axis == 1 else None
    if groups is None:
        raise ValueError(f"hqc::hadamard: axis {axis} of {x.ndim}; expected 1 or the last")
    return torch.matmul(matrix, groups).mul_(block**-0.5).view(x.shape)


@hadamard.register_fake
def _(x: Tensor, block: int, axis: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ctx.block, ctx.axis = inputs


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return hadamard(grad.contiguous(), ctx.block, ctx.axis), None, None


hadamard.register_autograd(_backward, setup_context=_setup_context)
