"""Attention with heads too wide for flash kernels runs in hqc's own two kernels, and writes codes.

    before   quantise(reshape(transpose(scaled_dot_product_attention(split(q), split(k), split(v)))))
    after    WideAttention(q, k, v, inverse_scale)        q, k, v [N, T, h·d], as their product wrote them

torch's only fused kernel for heads wider than 256 is the memory-efficient one: on an H100 97 us for one head of 384 and
8×1 024 tokens, where two batched products and a softmax take 45.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional

from hqc.kernels import Quantiser
from hqc.kernels.guards import row_pitch
from hqc.program import aten, is_op
from hqc.runtimes.integer.fusions.codes_from_products import WIDEST_BLOCK
from hqc.runtimes.integer.fusions.fusion import Found, Match, Placed, is_reshape, name_of, only_reader
from hqc.runtimes.integer.kernel_set import Kernels
from hqc.runtimes.integer.layers import Codes, KernelCall, Quantise

__all__ = ["TakeWideAttention", "WideAttention"]

_WIDEST_FLASH = 256
"""Flash attention and cuDNN's take no wider head."""
_MOST_SCORES = 2**28
"""Scores that are written to memory, half a gigabyte in float16; with more torch's fused kernel is taken."""


class WideAttention(KernelCall):
    """q [N, T, C], k and v [N, S, C] -> softmax(q·kᵀ·scale)·v for each head [N, T, C], or its codes."""

    activations = (0, 1, 2)

    def __init__(self, kernels: Kernels, *, heads: int, scale: float, codes: Codes | None) -> None:
        super().__init__(kernels)
        self.heads, self.scale, self.codes = heads, scale, codes

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inverse_scale: Tensor | None = None) -> Tensor:
        """inverse_scale fp32 [N] of the codes."""
        q, k, v = (t if row_pitch(t) else t.contiguous() for t in (q, k, v))
        quantiser = None
        if self.codes is not None and inverse_scale is not None:
            quantiser = self.codes.quantiser(inverse_scale)
        scores = q.shape[0] * self.heads * q.shape[1] * k.shape[1]
        if q.dtype == torch.float32 or scores > _MOST_SCORES:
            return self._fused(q, k, v, quantiser)
        return self.kernels.wide_attention(q, k, v, heads=self.heads, scale=self.scale, quantiser=quantiser)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, quantiser: Quantiser | None) -> Tensor:
        """By torch, for float32 and for more scores than memory should hold."""
        a, b, c = (t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(a, b, c, scale=self.scale).transpose(1, 2).flatten(2).contiguous()
        if quantiser is None:
            return y
        return self.kernels.hadamard_quantize(y, quantiser.inverse_scale, **quantiser.form)

    def extra_repr(self) -> str:
        """What it prints as."""
        return f"heads={self.heads}, scale={self.scale:.4g}"


class TakeWideAttention:
    """Attention with heads wider than flash attention takes, and the quantiser that reads it."""

    name: ClassVar[str] = "take_wide_attention"

    def find(self, placed: Placed) -> Found:
        """Plain attentions of tokens split into heads; narrow heads stay with torch's fused kernels and are no miss."""
        found = Found()
        for node in placed.edit.graph.nodes:
            if not is_op(node, aten.scaled_dot_product_attention.default) or _width(node) <= _WIDEST_FLASH:
                continue
            tokens = [_tokens(argument) for argument in node.args[:3]]
            joined = _joined(node)
            name = name_of(joined or node)
            if len(node.args) > 3 or set(node.kwargs) - {"scale"}:
                found.miss(name, "it has a mask, dropout, or shared keys")
            elif joined is None or any(t is None for t in tokens):
                found.miss(name, "its heads are no slices of tokens, or something else reads it before they are joined")
            else:
                quantiser = _quantiser(placed, joined, _width(node))
                found.matches.append(Match(name_of(quantiser or node), (node, joined, quantiser)))
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """One call in the place of split heads, attention, joined heads and quantiser."""
        node, joined, quantiser = match.nodes
        tokens = tuple(_tokens(argument) for argument in node.args[:3])
        codes = None if quantiser is None else placed.codes_of(quantiser)
        scale = node.kwargs.get("scale") or 1 / math.sqrt(_width(node))
        heads = node.args[0].meta["shape"][1]
        module = WideAttention(placed.kernels, heads=heads, scale=scale, codes=codes)
        last = joined if quantiser is None else quantiser
        scales = {} if quantiser is None else {"inverse_scale": quantiser.args[1]}
        call = placed.call(last, module, tokens, last, **scales)
        last.replace_all_uses_with(call)
        placed.erase([last, joined, joined.args[0], node])
        placed.edit.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output", "call_module"))


def _width(node: fx.Node) -> int:
    """Of the heads; 0 if it is not known."""
    shape: Any = node.args[0].meta.get("shape", ())  # type: ignore[union-attr]
    return int(shape[-1]) if len(shape) == 4 and all(type(d) is int for d in (shape[1], shape[-1])) else 0


def _tokens(heads: Any) -> fx.Node | None:
    """x [N, T, h·d] of transpose(reshape(x, [N, T, h, d]), 1, 2)."""
    if not _swaps_heads(heads) or not is_reshape(heads.args[0]):
        return None
    split, x = heads.args[0].meta.get("shape", ()), heads.args[0].args[0]
    shape = x.meta.get("shape", ())
    whole = len(shape) == 3 and len(split) == 4 and split[0] == shape[0] and split[1] == shape[1]
    return x if whole and split[2] * split[3] == shape[2] else None


def _joined(node: fx.Node) -> fx.Node | None:
    """The reshape to [N, T, h·d] behind transpose(attention, 1, 2), each read by the next alone."""
    turned = only_reader(node)
    if turned is None or not _swaps_heads(turned):
        return None
    joined = only_reader(turned)
    if joined is None or not is_reshape(joined):
        return None
    before, after = turned.meta.get("shape", ()), joined.meta.get("shape", ())
    whole = len(before) == 4 and len(after) == 3 and after[:2] == before[:2] and after[2] == before[2] * before[3]
    return joined if whole else None


def _swaps_heads(node: Any) -> bool:
    """Whether a node swaps tokens and heads."""
    return is_op(node, aten.transpose.int) and sorted(node.args[1:]) == [1, 2]


def _quantiser(placed: Placed, joined: fx.Node, width: int) -> fx.Node | None:
    """The quantiser of tokens that alone reads an attention, with blocks that lie in one head and in one tile."""
    reader = only_reader(joined)
    module = placed.module(reader)
    if not isinstance(module, Quantise) or module.image:
        return None
    block = module.codes.block
    return reader if width % block == 0 and block <= WIDEST_BLOCK else None
