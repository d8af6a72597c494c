"""Activations and gates of feed-forward layers write codes: after their product, or in its epilogue.

before   a, g = chunk(product(codes, s)); quantise(a·gelu(g))
after    GateQuantise(product(codes, s))                           one pass over memory
after    product'(codes, s, inverse_scale)                         none: the weight's rows a_i, g_i stand in pairs
before   quantise(gelu(x)), quantise(silu(x))
after    GateQuantise(x)
"""

import operator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from hqc.program import aten, is_op
from hqc.runtimes.integer.fusions.codes_from_products import WIDEST_BLOCK
from hqc.runtimes.integer.fusions.fusion import Found, Match, Placed, calls_of, name_of, only_reader
from hqc.runtimes.integer.layers import GateQuantise, IntegerLinear, Quantise

__all__ = ["GateInProduct", "QuantiseGate"]


class QuantiseGate:
    """One pass for the activation or gate and its quantiser."""

    name: ClassVar[str] = "quantise_gate"

    def find(self, placed: Placed) -> Found:
        """Quantisers of tokens that read an activation, or the product of a half with the other's activation."""
        found = Found()
        for node, module in calls_of(placed, Quantise):
            y = node.args[0]
            assert isinstance(y, fx.Node)
            if module.image or not (_kind(y) or is_op(y, aten.mul.Tensor)):
                continue
            if only_reader(y) is None:
                found.miss(name_of(node), "something else reads the activation")
            elif _kind(y):
                found.matches.append(Match(name_of(node), (node, y.args[0], _kind(y), False)))
            elif (gate := _gate(y)) is not None:
                found.matches.append(Match(name_of(node), (node, *gate, True)))
            else:
                found.miss(name_of(node), "the product it reads is no half times the other half's activation")
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """One call in the place of chunk, activation, product and quantiser."""
        node, x, kind, gated = match.nodes
        module = GateQuantise(placed.kernels, placed.codes_of(node), kind=kind, gated=gated)
        call = placed.call(node, module, (x, node.args[1]), node)
        node.replace_all_uses_with(call)
        placed.erase([node])
        # What stood between is dead: `drop_dead` takes it out.
        placed.edit.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output", "call_module"))


class GateInProduct:
    """The gate in the epilogue of the product that it reads: codes are written, the wide floats never."""

    name: ClassVar[str] = "gate_in_product"

    def find(self, placed: Placed) -> Found:
        """Gates whose halves one linear writes for them alone."""
        found = Found()
        for node, module in calls_of(placed, GateQuantise):
            product = node.args[0]
            assert isinstance(product, fx.Node)
            layer = placed.module(product)
            if not module.gated:
                continue
            if not isinstance(layer, IntegerLinear) or only_reader(product) is None:
                found.miss(name_of(node), "its halves are not written by one linear for it alone")
            elif layer.silu or product.kwargs:
                found.miss(name_of(node), "its linear has another epilogue already")
            elif module.codes.block > WIDEST_BLOCK // 2:
                found.miss(name_of(node), f"its rotation is wider than half a tile of {WIDEST_BLOCK} outputs")
            else:
                found.matches.append(Match(name_of(node), (node, product)))
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """A product with the rows of both halves in pairs."""
        node, product = match.nodes
        layer, gate = placed.modules[product.target], placed.modules[node.target]
        assert isinstance(layer, IntegerLinear)
        assert isinstance(gate, GateQuantise)
        old = layer.weight
        high = None if old.high is None else _paired(old.high)
        weight = replace(old, codes=_paired(old.codes), scale=_paired(old.scale), high=high)
        bias = None if layer.bias is None else _paired(layer.bias)
        module = IntegerLinear(layer.kernels, weight, bias, silu=False, reach=layer.reach, size=layer.size)
        module.gate, module.quantised = gate.kind, gate.codes
        call = placed.call(node, module, product.args, node, inverse_scale=node.args[1])
        node.replace_all_uses_with(call)
        placed.erase([node, product])


def _paired(rows: Tensor) -> Tensor:
    """Rows a_0 … a_n, g_0 … g_n -> a_0, g_0, a_1, g_1, …"""
    a, g = rows.chunk(2)
    return torch.stack([a, g], 1).flatten(0, 1).contiguous()


def _kind(node: Any) -> str:
    """The kernels' name of an activation, "" for anything else."""
    if is_op(node, aten.silu.default):
        return "silu"
    if is_op(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return ""


def _gate(product: fx.Node) -> tuple[fx.Node, str] | None:
    """(x, activation) of chunk(x)[0]·activation(chunk(x)[1]), read by nothing else."""
    for a, b in (product.args[:2], reversed(product.args[:2])):
        if not isinstance(b, fx.Node) or not _kind(b) or only_reader(b) is None:
            continue
        halves = (a, b.args[0])
        if not all(isinstance(h, fx.Node) and h.target is operator.getitem and only_reader(h) for h in halves):
            continue
        chunk = halves[0].args[0]  # type: ignore[union-attr]
        in_order = [h.args[1] for h in halves] == [0, 1]  # type: ignore[union-attr]
        if chunk is halves[1].args[0] and in_order and _is_halving(chunk):  # type: ignore[union-attr]
            return chunk.args[0], _kind(b)  # type: ignore[return-value, union-attr]
    return None


def _is_halving(node: Any) -> bool:
    """chunk(x, 2, -1) that nothing else reads."""
    if not is_op(node, aten.chunk.default) or len(node.users) != 2:
        return False
    axes = len(node.args[0].meta.get("shape", ()))
    width = node.args[0].meta["shape"][-1] if axes else 1
    return node.args[1] == 2 and len(node.args) > 2 and node.args[2] in (-1, axes - 1) and width % 2 == 0
