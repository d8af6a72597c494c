"""Attention by `attention.cpp` where there is little to do, as torch's operator begins and shares out more slowly."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from hqc.program import aten, is_op
from hqc.runtimes.integer.cpu import steps
from hqc.runtimes.integer.cpu.steps import address, recorder, run_step, whole_numbers

__all__ = ["OwnAttention", "attended_like", "take_attention"]

_FEW = 50_000_000
"""Multiplications of a call, up to which attention is ours."""
_attend: Any = aten.scaled_dot_product_attention.default


class OwnAttention(nn.Module):
    """q [N, h, T, d], k [N, h, S, d], v [N, h, S, e] -> softmax(q·kᵀ·scale)·v [N, h, T, e], tokens outside heads."""

    def __init__(self, functions: ctypes.CDLL, scale: float | None) -> None:
        """functions: of `compiler.compiled_passes`. scale: None for 1/√d."""
        super().__init__()
        self._functions, self.scale = steps.load_steps(functions), scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """float32."""
        if q.ndim != 4 or not q.shape[:2] == k.shape[:2] == v.shape[:2] or _multiplications(q, v) > _FEW:
            return self._by_torch(q, k, v)
        (samples, heads, queries, depth), (keys, width) = q.shape, v.shape[2:]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        y = torch.empty((samples, queries, heads, width), device=q.device)
        sizes = (samples, heads, queries, keys, depth, width)
        pitches = (whole_numbers(x.stride()[:3]) for x in (q, k, v))
        scale = 1 / math.sqrt(depth) if self.scale is None else self.scale
        run_step(self._functions, steps.Attention(*map(address, (q, k, v, y)), *sizes, *pitches, scale))
        return y.transpose(1, 2)

    def _by_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        taker = recorder()
        if taker is None:
            return _attend(q, k, v, scale=self.scale)  # type: ignore[no-any-return]
        y = attended_like(q, v)
        taker.shares_threads = True
        taker.call(_attend, (q, k, v), {"scale": self.scale}, y)
        return y


def attended_like(q: Tensor, v: Tensor) -> Tensor:
    """Room for what torch's attention gives on a CPU: heads side by side in memory.

    Not by `q.new_empty`, which a recording would write down as a call.
    """
    *samples, heads, queries, _ = q.shape
    return torch.empty((*samples, queries, heads, v.shape[-1]), dtype=q.dtype, device=q.device).transpose(-2, -3)


def _multiplications(q: Tensor, v: Tensor) -> int:
    return q.numel() // q.shape[-1] * v.shape[-2] * (q.shape[-1] + v.shape[-1])


def take_attention(module: fx.GraphModule, functions: ctypes.CDLL) -> None:
    """Puts it in the place of torch's operator, where that has neither mask nor dropout nor shared keys."""
    for index, node in enumerate([n for n in module.graph.nodes if is_op(n, _attend)]):
        if len(node.args) > 3 or set(node.kwargs) - {"scale"}:
            continue
        name = f"attention_{index}"
        module.add_submodule(name, OwnAttention(functions, node.kwargs.get("scale")))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(name, node.args)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.recompile()
