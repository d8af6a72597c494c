"""Freeze to integers: weights become codes; quantisers become explicit quantise/dequantise pairs.

    before   op(Ĥ·FQ(Ĥ·x; s_a), FQ(W; s_w))
    after    op(Ĥ·DQ(Q(Ĥ·x; s_a); s_a), DQ(w_q; s_w)),  w_q = clip(round(W·(1/s_w))) int8, computed once

FQ = DQ∘Q with the same operations in the same order, so no value changes. A range that has a zero point becomes two
tables of whole numbers, the least and the largest code at each timestep; weight codes are then q - z. This is the form
that the portable export writes; `rotate_weights` turns it into integer products.

Where scales are of groups of channels, `quantize_grouped` and `dequantize_grouped` take their places; a scale that is
the values' own stays what it is, `dynamic_scale`.

A weight of a table beside a float activation becomes `lookup(codes, table)`, with the values that its rows have.

A weight that has binary codes besides becomes two layers that read the same activation codes, `site` and
`site:residual`, and their sum:

    before   op(x̂, Q(W) + α·sign(W - Q(W))) + b
    after    (op(x̂, DQ(w_q; s_w)) + b) + op(x̂, DQ(r; α)),  r = sign(W - DQ(w_q)) of the salient channels, else 0
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from hqc.bits import LOWEST_BITS
from hqc.bounds import Lookups, bounds_of
from hqc.errors import PassError
from hqc.ops import table_codes
from hqc.passes.insert_qdq import residual_step_of
from hqc.passes.rewriting import Rewriter, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.plan import QuantPlan, SitePlan
from hqc.program import BATCH, Program, Stage, aten, is_op
from hqc.site_names import residual_site
from hqc.sites import residual_name

__all__ = ["FreezeIntegers"]

ops = torch.ops.hqc
_ROLES = {"activation_quantizer": ("codes", "activation"), "operand_quantizer": ("operand_codes", "operand")}
"""Of quantisers, and what their codes and reals are then."""


@dataclass(frozen=True)
class FreezeIntegers:
    """Replaces every fake quantiser by codes and scales."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED, Stage.TRAINED)
    gives: ClassVar[Stage | None] = Stage.INTEGER
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Every site with codes of a weight."""
        found = [plan.site for plan in program.plan.coded]
        misses = tuple((p.site, f"float: {p.reason}") for p in program.plan.sites if p.site not in found)
        return Findings(tuple(found), misses)

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Freezes weights, splits activation quantisers."""
        if left := [plan.site for plan in program.plan.sites if plan.lora_rank]:
            raise PassError("freeze_integers", f"{left[0]} still has a LoRA", "Run merge_lora first.")
        edit, signs = rewrite(program), {}
        for site in matches:
            if program.plan[site].weight_only:
                _freeze_table(edit, program.plan[site])
            else:
                signs[site] = self._freeze_weight(edit, site)
        for node in list(edit.graph.nodes):
            if node.meta.get("role") in _ROLES:
                self._split(edit, node, *_ROLES[node.meta["role"]])
        found = {site: parts for site, parts in signs.items() if parts is not None}
        for site, parts in found.items():
            _add_product(edit, site, *parts)
        return edit.finish(plan=_with_products(program.plan, found))

    @staticmethod
    def _freeze_weight(edit: Rewriter, site: str) -> tuple[Tensor, Tensor] | None:
        """Gives binary codes and their steps, if any channel has some."""
        layer = edit.layers[site]
        quantiser = layer_inputs(layer)[1]
        if is_op(quantiser, ops.fake_quantize_grouped.default):
            _freeze_groups(edit, site, layer, quantiser)
            return None
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
        return _binary_codes(edit.program, quantiser, weight, codes, scale)

    @staticmethod
    def _split(edit: Rewriter, node: fx.Node, codes_role: str, real_role: str) -> None:
        x, scale = node.args[:2]
        groups = node.args[4:] if is_op(node, ops.fake_quantize_grouped.default) else ()
        site, lookups = str(node.meta["site"]), bounds_of(node, edit.program).lookups
        target = ops.quantize.default if lookups is None else ops.quantize_bounded.default
        target = ops.quantize_grouped.default if groups else target
        bounds = node.args[2:] if lookups is None else _stored_bounds(edit, node, lookups)
        own = {"site": site, **({"scope": node.meta["scope"]} if "scope" in node.meta else {})}
        meta = {**own, "shape": node.meta["shape"], "dtype": "int8", "role": codes_role}
        codes = edit.call(node, target, x, scale, *bounds, **meta)
        back = ops.dequantize_grouped.default if groups else ops.dequantize.default
        real = edit.call(node, back, codes, scale, *groups, like=node, **own, role=real_role)
        node.replace_all_uses_with(real)


def _freeze_groups(edit: Rewriter, site: str, layer: fx.Node, quantiser: fx.Node) -> None:
    """A weight with a scale for every group of input channels; it has no binary codes."""
    stored_weight, stored_scale, low, high, *groups = quantiser.args
    weight, scale = (edit.program.state[str(node.target)] for node in (stored_weight, stored_scale))  # type: ignore[union-attr]
    codes = edit.weight(f"{site}.weight_codes", ops.quantize_grouped(weight, scale, low, high, *groups), layer)
    back = ops.dequantize_grouped.default
    found = edit.call(layer, back, codes, stored_scale, *groups, like=quantiser, site=site, role="weight")
    layer.replace_input_with(quantiser, found)


def _freeze_table(edit: Rewriter, plan: SitePlan) -> None:
    layer, site = edit.layers[plan.site], plan.site
    weight = layer_inputs(layer)[1]
    try:
        codes, table = table_codes(edit.program.state[str(weight.target)], 2 ** (plan.weight_bits or 8))
    except ValueError as error:
        raise PassError(f"freeze_integers at {site}", str(error), "Run fit_lookup first.") from error
    stored = edit.weight(f"{site}.weight_codes", codes, layer)
    entries = edit.weight(f"{site}.weight_table", table, layer)
    found = edit.call(layer, ops.lookup.default, stored, entries, like=weight, site=site, role="weight")
    layer.replace_input_with(weight, found)


def _binary_codes(
    program: Program, quantiser: fx.Node, weight: Tensor, codes: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor] | None:
    """sign(W - s·codes) where a channel's step is not 0, and the steps; None where none has one."""
    if not is_op(quantiser, ops.fake_quantize_residual.default):
        return None
    step = residual_step_of(program, quantiser)
    if not bool(step.any()):
        return None
    signs = (weight - ops.dequantize(codes, scale)).sign() * (step != 0).view(-1, *[1] * (weight.ndim - 1))
    return signs.to(torch.int8), torch.where(step != 0, step, torch.ones_like(step))


def _add_product(edit: Rewriter, site: str, signs: Tensor, step: Tensor) -> None:
    """Puts a layer of the same input and geometry beside a site's, and their sum behind both."""
    layer, own = edit.layers[site], residual_site(site)
    edit.layers[own] = layer  # calls of the new site have the scope of this one
    after, readers, weight = layer.next, list(layer.users), layer_inputs(layer)[1]
    codes = edit.weight(f"{own}.weight_codes", signs, after)
    scale = edit.weight(f"{own}.weight_scale", step, after)
    real = edit.call(after, ops.dequantize.default, codes, scale, like=weight, site=own, role="weight")
    arguments = (layer.args[0], real, None, *layer.args[3:])
    second = edit.call(after, layer.target, *arguments, like=layer, site=own, role="layer")
    total = edit.call(after, aten.add.Tensor, layer, second, like=layer, site=site, role="residual")
    total.name = residual_name(site)
    for reader in readers:
        reader.replace_input_with(layer, total)


def _with_products(plan: QuantPlan, sites: Collection[str]) -> QuantPlan:
    """The plan with a site for the binary codes of each of these."""
    planned: list[SitePlan] = []
    for one in plan.sites:
        planned.append(one)
        if one.site in sites:
            reason = f"binary codes beside those of {one.site}"
            plain = replace(one, weight_symmetric=True, weight_mixed=False, weight_residual=False, branch_rank=0)
            planned.append(replace(plain, site=residual_site(one.site), weight_bits=LOWEST_BITS, reason=reason))
    return replace(plan, sites=tuple(planned))


def _stored_bounds(edit: Rewriter, quantiser: fx.Node, lookups: Lookups) -> tuple[fx.Node, ...]:
    """The bounds of each sample, looked up from tables in the row of its scale."""
    site, found = str(quantiser.meta["site"]), []
    for name, table, node in (("low", lookups.lows, lookups.low), ("high", lookups.highs, lookups.high)):
        stored = edit.weight(f"{site}.activation_{name}_table", table, quantiser)
        row = node.args[2]
        found.append(edit.call(quantiser, aten.index_select.default, stored, 0, row, shape=(BATCH,), dtype="float32"))
    return tuple(found)
