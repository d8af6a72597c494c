"""One look-up for all scale tables: tables side by side, one Gather, one Reciprocal, one Split.

    tables [T] of S sites -> [T, S] -> Gather(row [N]) -> [N, S, 1, …] -> S scales [N, 1, …]

A look-up of its own for every site would cost five tiny nodes each; here they are five for all sites of one rank.
"""

from collections import defaultdict

import onnx_ir as ir
import torch
from torch import fx

from hqc.export.lowering import Lowering
from hqc.program import aten, is_op

__all__ = ["ScaleBank"]

ops = torch.ops.hqc


class ScaleBank:
    """The scale of each activation, shaped to broadcast over its sample, and the reciprocal."""

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering
        self._groups: dict[tuple[fx.Node, int], list[fx.Node]] = defaultdict(list)
        self._place: dict[fx.Node, tuple[fx.Node, int]] = {}
        for node in lowering.program.graph.nodes:
            if is_op(node, ops.quantize.default):
                self._add(node.args[1], len(lowering.shape(node.args[0])))

    def _add(self, lookup: fx.Node, rank: int) -> None:
        if not is_op(lookup, aten.index_select.default) or lookup in self._place or lookup.args[1] != 0:
            return
        if lookup.args[0].op != "get_attr" or lookup.args[0].meta["shape"] != self._rows(lookup):  # type: ignore[union-attr]
            return
        group = (lookup.args[2], rank)
        self._place[lookup] = group  # type: ignore[assignment]
        self._groups[group].append(lookup)  # type: ignore[index]

    def _rows(self, lookup: fx.Node) -> tuple[int | str, ...]:
        return (self._lowering.shape(lookup.args[0])[0],)

    def holds(self, node: fx.Node) -> bool:
        """Whether a look-up is served by the bank."""
        return node in self._place

    def scale(self, lookup: fx.Node, rank: int) -> ir.Value:
        """s [N, 1, …]."""
        return self._part(lookup, rank, reciprocal=False)

    def reciprocal(self, lookup: fx.Node, rank: int) -> ir.Value:
        """1/s [N, 1, …]."""
        return self._part(lookup, rank, reciprocal=True)

    def _part(self, lookup: fx.Node, rank: int, *, reciprocal: bool) -> ir.Value:
        lo, b = self._lowering, self._lowering.builder
        if lookup not in self._place:
            scale = lo.value(lookup)
            value = b.op("Reciprocal", scale) if reciprocal else scale
            return b.reshape(value, [-1] + [1] * (rank - 1))
        row, own_rank = group = self._place[lookup]
        lookups = self._groups[group]
        columns = [b.reshape(lo.value(other.args[0]), [-1, 1]) for other in lookups]
        tables = b.op("Concat", *columns, axis=1) if len(columns) > 1 else columns[0]
        picked = b.op("Gather", tables, lo.value(row), axis=0, name=f"scales_{own_rank}d")
        if reciprocal:
            picked = b.op("Reciprocal", picked, name=f"inverse_scales_{own_rank}d")
        shaped = b.reshape(picked, [-1, len(lookups)] + [1] * (own_rank - 2))
        if len(lookups) == 1:
            return shaped
        parts = b.ops("Split", shaped, b.ints(*[1] * len(lookups)), count=len(lookups), axis=1)
        part = parts[lookups.index(lookup)]
        return part if rank == own_rank else b.reshape(part, [-1] + [1] * (rank - 1))
