"""Products that read the same codes become one product with their outputs side by side.

before   y_i = codes·W_iᵀ·s + b_i            q, k and v; the time embedding's projections of all blocks
after    y = codes·[W_1; W_2; …]ᵀ·s + b,     y_i = y[…, from_i : to_i]
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from hqc.program import aten
from hqc.runtimes.integer.fusions.fusion import Found, Match, Placed, calls_of, name_of
from hqc.runtimes.integer.layers import IntegerLayer, IntegerLinear

__all__ = ["MergeProducts"]


class MergeProducts:
    """One GEMM for all linears that read the same codes with the same scale and hold their weights in one form."""

    name: ClassVar[str] = "merge_products"

    def find(self, placed: Placed) -> Found:
        """Groups of two or more; a miss is a linear beside others of another form."""
        found, groups = Found(), defaultdict[Any, list[fx.Node]](list)
        beside = defaultdict[Any, int](int)
        for node, layer in calls_of(placed, IntegerLinear):
            if not node.kwargs and layer.gate == "none" and layer.quantised is None:
                beside[node.args] += 1
                groups[(node.args, _form(layer))].append(node)
        for (arguments, _), nodes in groups.items():
            if len(nodes) > 1:
                found.matches.append(Match(name_of(nodes[0]), tuple(nodes)))
            elif beside[arguments] > 1:
                found.miss(name_of(nodes[0]), "holds its weight in another form than the linears beside it")
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """The wide product stands where the first of them stood."""
        nodes: tuple[fx.Node, ...] = match.nodes
        layers = [layer for node in nodes if (layer := placed.layer(node)) is not None]
        weights = [layer.weight for layer in layers]
        highs = [w.high for w in weights if w.high is not None]
        wide = replace(
            weights[0],
            codes=torch.cat([w.codes for w in weights]),
            scale=torch.cat([w.scale for w in weights]),
            high=torch.cat(highs) if highs else None,
        )
        reach, size = max(layer.reach for layer in layers), layers[0].size
        module = IntegerLinear(placed.kernels, wide, _biases(layers), silu=layers[0].silu, reach=reach, size=size)
        *places, _ = nodes[0].meta["shape"]
        merged = placed.call(nodes[0], module, nodes[0].args, nodes[0])
        merged.meta["shape"] = (*places, len(wide.scale))
        start = 0
        for node, weight in zip(nodes, weights, strict=True):
            end = start + len(weight.scale)
            meta = {key: node.meta[key] for key in ("shape", "dtype", "site") if key in node.meta}
            part = placed.edit.call(node, aten.slice.Tensor, merged, -1, start, end, **meta)
            node.replace_all_uses_with(part)
            start = end
        placed.erase(nodes)


def _form(layer: IntegerLinear) -> tuple[Any, ...]:
    """Equal for weights that may stand in one tensor."""
    weight = layer.weight
    return (
        weight.codes.dtype,
        weight.codes.shape[1:],
        weight.high is None,
        weight.high_factor,
        weight.rotation,
        weight.regular,
        layer.silu,
    )


def _biases(layers: list[IntegerLayer]) -> Tensor | None:
    """Side by side, 0 where a layer has none; None where none has."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([torch.zeros_like(x.weight_scale) if x.bias is None else x.bias for x in layers])
