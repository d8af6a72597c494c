"""Attention with heads too wide for flash kernels runs as two batched products and a softmax.

    before   scaled_dot_product_attention(q, k, v), heads wider than 256
    after    softmax(q·kᵀ·scale)·v

torch's only fused kernel for such heads is the memory-efficient one; on an H100 with one head of 384 and 1 024 tokens it
takes 99 us where these three take 53.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional

from hqc.program import aten, is_op
from hqc.runtimes.cuda.fusions.fusion import Found, Match, Placed, name_of

__all__ = ["WideAttention", "wide_attention"]

_WIDEST_FLASH = 256
"""Flash attention and cuDNN's take no wider head."""
_MOST_SCORES = 2**28
"""Scores that are written to memory, half a gigabyte in float16; with more the fused kernel is taken."""


def wide_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q·kᵀ·scale)·v for q [N, h, T, d], k and v [N, h, S, d]."""
    n, heads, tokens, _ = q.shape
    if n * heads * tokens * k.shape[2] > _MOST_SCORES:
        return functional.scaled_dot_product_attention(q, k, v, scale=scale)
    queries, keys, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.baddbmm(queries.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1), values).unflatten(0, (n, heads))


class WideAttention:
    """Takes the quicker of torch's ways for heads wider than flash attention takes."""

    name: ClassVar[str] = "wide_attention"

    def find(self, placed: Placed) -> Found:
        """Plain attentions of known width; narrow heads stay with torch's fused kernels and are no miss."""
        found = Found()
        for node in placed.edit.graph.nodes:
            if not is_op(node, aten.scaled_dot_product_attention.default):
                continue
            shapes: list[Any] = [a.meta.get("shape", ()) for a in node.args[:3] if isinstance(a, fx.Node)]
            if (
                not all(len(shape) == 4 and type(shape[-1]) is int for shape in shapes)
                or shapes[0][-1] <= _WIDEST_FLASH
            ):
                continue
            if shapes[0][1] != shapes[1][1] or len(node.args) > 3 or set(node.kwargs) - {"scale"}:
                found.miss(name_of(node), "it has a mask, dropout, or shared keys")
            else:
                found.matches.append(Match(name_of(node), (node, shapes[0][-1])))
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """The same inputs, the same shape."""
        node, width = match.nodes
        scale = node.kwargs.get("scale") or 1 / math.sqrt(width)
        call = placed.edit.call(node, wide_attention, *node.args[:3], scale, like=node)
        node.replace_all_uses_with(call)
        placed.erase([node])
