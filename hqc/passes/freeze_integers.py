"""Freeze to integers: weights become codes; quantisers become explicit quantise/dequantise pairs.

    before   op(Ĥ·FQ(Ĥ·x; s_a), FQ(W; s_w))
    after    op(Ĥ·DQ(Q(Ĥ·x; s_a); s_a), DQ(w_q; s_w)),  w_q = clip(round(W·(1/s_w))) int8, computed once

FQ = DQ∘Q with the same operations in the same order, so no value changes. A range that has a zero point becomes two
tables of whole numbers, the least and the largest code at each timestep; weight codes are then q - z. This is the form
that the portable export writes; `rotate_weights` turns it into integer products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from hqc.bounds import Lookups, bounds_of
from hqc.errors import PassError
from hqc.passes.rewriting import Rewriter, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.program import BATCH, Program, Stage, aten

__all__ = ["FreezeIntegers"]

ops = torch.ops.hqc


@dataclass(frozen=True)
class FreezeIntegers:
    """Replaces every fake quantiser by codes and scales."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED, Stage.TRAINED)
    gives: ClassVar[Stage | None] = Stage.INTEGER
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Every quantised site."""
        misses = tuple((p.site, f"float: {p.reason}") for p in program.plan.sites if not p.quantised)
        return Findings(tuple(p.site for p in program.plan.quantised), misses)

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Freezes weights, splits activation quantisers."""
        if left := [plan.site for plan in program.plan.sites if plan.lora_rank]:
            raise PassError("freeze_integers", f"{left[0]} still has a LoRA", "Run merge_lora first.")
        edit = rewrite(program)
        for site in matches:
            self._freeze_weight(edit, site)
        for node in list(edit.graph.nodes):
            if node.meta.get("role") == "activation_quantizer":
                self._split(edit, node)
        return edit.finish()

    @staticmethod
    def _freeze_weight(edit: Rewriter, site: str) -> None:
        layer = edit.layers[site]
        quantiser = layer_inputs(layer)[1]
        weight, scale = (edit.program.state[str(node.target)] for node in quantiser.args[:2])  # type: ignore[union-attr]
        bounds = bounds_of(quantiser, edit.program)
        if bounds.lookups is None:
            codes = ops.quantize(weight, scale, bounds.low, bounds.high)
        else:
            codes = ops.quantize_bounded(weight, scale, bounds.lookups.lows, bounds.lookups.highs)
        stored = edit.weight(f"{site}.weight_codes", codes, layer)
        dequantised = edit.call(
            layer, ops.dequantize.default, stored, quantiser.args[1], like=quantiser, site=site, role="weight"
        )
        layer.replace_input_with(quantiser, dequantised)

    @staticmethod
    def _split(edit: Rewriter, node: fx.Node) -> None:
        x, scale = node.args[:2]
        site, lookups = str(node.meta["site"]), bounds_of(node, edit.program).lookups
        target = ops.quantize.default if lookups is None else ops.quantize_bounded.default
        bounds = node.args[2:] if lookups is None else _stored_bounds(edit, node, lookups)
        meta = {"site": site, "shape": node.meta["shape"]}
        codes = edit.call(node, target, x, scale, *bounds, **meta, dtype="int8", role="codes")
        real = edit.call(node, ops.dequantize.default, codes, scale, like=node, site=site, role="activation")
        node.replace_all_uses_with(real)


def _stored_bounds(edit: Rewriter, quantiser: fx.Node, lookups: Lookups) -> tuple[fx.Node, ...]:
    """The bounds of each sample, looked up from tables in the row of its scale."""
    site, found = str(quantiser.meta["site"]), []
    for name, table, node in (("low", lookups.lows, lookups.low), ("high", lookups.highs, lookups.high)):
        stored = edit.weight(f"{site}.activation_{name}_table", table, quantiser)
        row = node.args[2]
        found.append(edit.call(quantiser, aten.index_select.default, stored, 0, row, shape=(BATCH,), dtype="float32"))
    return tuple(found)
