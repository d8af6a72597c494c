"""Attention of wide heads as a function of torch tensors; the two kernels of `hqc.kernels.jit.attention`."""

import math

import torch
from torch import Tensor

from hqc.errors import KernelError
from hqc.kernels.attention_options import ScoresOptions, ValuesOptions
from hqc.kernels.cards import Card, card_of
from hqc.kernels.guards import check_devices, check_total, row_pitch
from hqc.kernels.launching import kernel_options, launch_kernel
from hqc.kernels.operands import Quantiser, check_quantiser

__all__ = ["wide_attention"]

_LOG2_E = 1.4426950408889634
_MOST_PARTS = 128
"""Tiles of keys of which a program of the second kernel holds the maxima."""


def wide_attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, scale: float | None = None, quantiser: Quantiser | None = None
) -> Tensor:
    """softmax(q·kᵀ·scale)·v for each head, or its codes.

    q [N, T, heads·d], k and v [N, S, heads·d] in float16 or bfloat16, rows one pitch apart (slices of one product's
    output); scale 1/√d unless given.  -> [N, T, heads·d] in their dtype, or int8 with a quantiser.

    Raises:
        KernelError: for shapes, dtypes or devices that the kernels do not take.
        RuntimeMissingError: if triton is missing.
    """
    where = "wide_attention"
    pitches = [_row_pitch(where, name, tensor) for name, tensor in (("q", q), ("k", k), ("v", v))]
    samples, tokens, channels = q.shape
    keys = k.shape[1]
    if k.shape != v.shape or k.shape[0] != samples or k.shape[2] != channels or channels % max(1, heads):
        found = f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} for {heads} heads"
        raise KernelError(where, found, "Check the layer's sizes.")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (torch.float16, torch.bfloat16):
        raise KernelError(where, f"the dtypes are {q.dtype}, {k.dtype}, {v.dtype}, expected one half", "Convert them.")
    if quantiser is not None:
        check_quantiser(where, quantiser, samples, channels // heads)
    check_total(where, q=q, k=k, scores=q.new_empty((samples * heads, tokens, keys), device="meta"))
    check_devices(where, q, k, v, None if quantiser is None else quantiser.inverse_scale)
    y = torch.empty((samples, tokens, channels), dtype=q.dtype if quantiser is None else torch.int8, device=q.device)
    if not y.numel():
        return y
    width = channels // heads
    tall, part, wide, warps = _tile(card_of(q.device), tokens)
    while -(-keys // part) > _MOST_PARTS:
        part *= 2
    parts = -(-keys // part)
    p = torch.empty((samples * heads, tokens, keys), dtype=q.dtype, device=q.device)
    maxima = torch.empty((samples * heads, parts, 2, tokens), dtype=torch.float32, device=q.device)
    scores = kernel_options(
        where,
        ScoresOptions,
        scale=(1 / math.sqrt(width) if scale is None else scale) * _LOG2_E,
        heads=heads,
        width=width,
        q_pitch=pitches[0],
        k_pitch=pitches[1],
        tile_rows=tall,
        tile_keys=part,
        num_warps=warps,
    )
    rows = -(-tokens // tall)
    launch_kernel(where, scores, (parts, rows, samples * heads), (q, k, tokens, keys, p, maxima))
    values = kernel_options(
        where,
        ValuesOptions,
        heads=heads,
        width=width,
        v_pitch=pitches[2],
        parts=parts,
        codes=quantiser is not None,
        tile_rows=tall,
        tile_keys=part,
        tile_channels=max(wide, 1 if quantiser is None else quantiser.block),
        num_warps=warps,
        **({} if quantiser is None else quantiser.form),
    )
    inverse = None if quantiser is None else quantiser.inverse_scale
    grid = (-(-width // values.tile_channels), rows, samples * heads)
    launch_kernel(where, values, grid, (p, v, maxima, inverse, tokens, keys, y))
    return y


def _tile(card: Card, tokens: int) -> tuple[int, int, int, int]:
    """(rows, keys, channels of the values, warps) of a tile.

    128×128 in eight warps where there are rows for it and the matrix instructions read shared memory by themselves
    (capability 9); elsewhere that spills, and does not fit the 99 KiB that most cards have.
    """
    return (128, 128, 128, 8) if card.capability[0] == 9 and tokens > 64 else (64, 64, 64, 4)


def _row_pitch(where: str, name: str, tensor: Tensor) -> int:
    """Numbers between the starts of the rows of [N, T, C], which lie one pitch apart."""
    if tensor.ndim != 3:
        raise KernelError(where, f"{name} has {tensor.ndim} axes, expected [N, T, C]", "Reshape it.")
    pitch = row_pitch(tensor)
    if not pitch:
        raise KernelError(where, f"{name} has strides {tensor.stride()}, expected rows one pitch apart", "Copy it.")
    return pitch
