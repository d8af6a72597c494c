"""`hqc::hadamard`: block-diagonal normalised Hadamard rotation of one axis."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hqc.rotations import Rotation

__all__ = ["Hadamard", "hadamard", "hadamard_matrix", "regular", "sylvester"]

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


@lru_cache(maxsize=32)
def regular(order: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """The regular Hadamard matrix of an order 4^k, its product with H_2 of an order 2·4^k; entries ±1.

    H_4[i, j] = -1 where i ⊕ j = 3, else 1;  H_4n = H_4 ⊗ H_n,  H_2 as Sylvester's.  H = Hᵀ and H·H = order·I; every
    row of an order 4^k sums to √order.  With e = i ⊕ j the sign is the parity of e & (e ≫ 1) & 0x55…; below H_2 the
    pairs of bits begin at bit 1, and the parity of i & j & 1 comes to it.
    """
    if order < 4 or order & (order - 1):
        raise ValueError(f"regular: the order is {order}; expected a power of two from 4")
    fourth = 1 - 2 * torch.eye(4, dtype=dtype, device=device).flip(0)
    matrix = sylvester(2 if order.bit_length() % 2 == 0 else 1, dtype, device)
    while matrix.shape[0] < order:
        matrix = torch.kron(fourth, matrix)
    return matrix


def hadamard_matrix(rotation: Rotation, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """The ±1 matrix of a rotation, of its order and kind."""
    return (regular if rotation.regular else sylvester)(rotation.block, dtype, device)


def _rotate(x: Tensor, block: int, axis: int, regular: bool) -> Tensor:
    axis %= x.ndim
    matrix = hadamard_matrix(Rotation(block, regular), x.dtype, str(x.device))
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
def hadamard(x: Tensor, block: int, axis: int, regular: bool = False) -> Tensor:
    """Rotates `axis` of x by Ĥ = H_block/√block, block by block; its own inverse.

    y[…, g·b + i, …] = Σ_j H[i, j]·x[…, g·b + j, …] / √b,  same shape as x.
    The sum over ±x runs first and the factor 1/√b is applied last, as every export does, so that both sides
    round alike.  regular: H is the regular matrix of that order instead of Sylvester's.
    Source: HQ-DM (arXiv 2512.05746), single Hadamard transformation; ConvRot (arXiv 2512.03673) for regular matrices.
    """
    return _rotate(x, block, axis, regular)


@hadamard.register_fake
def _(x: Tensor, block: int, axis: int, regular: bool = False) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.rotation = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return hadamard(grad.contiguous(), *ctx.rotation), None, None, None


hadamard.register_autograd(_backward, setup_context=_setup_context)


class Hadamard(torch.autograd.Function):
    """The same rotation without the dispatcher, whose cost a call outweighs small tensors in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, axis: int, regular: bool) -> Tensor:  # type: ignore[override]
        """y = Ĥ·x; see `hadamard`."""
        ctx.rotation = (block, axis, regular)
        return _rotate(x, block, axis, regular)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Ĥ·grad: the rotation is symmetric."""
        return _rotate(grad, *ctx.rotation), None, None, None
