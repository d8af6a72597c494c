"""Weight-only sites: the activation quantiser goes, and the weight keeps its 4-bit codes.

    before   op(Ĥ·DQ(Q(Ĥ·x; s_a); s_a), DQ(w_q; s_w))    after   op(x, DQ(w_q; s_w))

Both rotations go with the quantiser that they enclose: Ĥ·Ĥ = 1. Where the weight was rotated instead of the activation
rotated back, the rotation stays: op(Ĥ·x, DQ(w_q; s_w)). Also here: the codes that no int8 quantiser makes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from hqc.bounds import FAKE_QUANTISERS, QUANTISERS, bounds_of
from hqc.errors import ExportError
from hqc.export.tensorrt.weights import stored_codes
from hqc.passes.rewriting import LINEAR, Rewriter, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage, is_op
from hqc.site_names import names_site
from hqc.sites import QuantisedSite, quantised_sites, rotation_within

__all__ = ["FloatActivations", "bypass_activation_quantisers", "refuse_wide_codes", "weight_only_sites"]

ops = torch.ops.hqc


@dataclass(frozen=True)
class FloatActivations:
    """Leaves the activations of matching linear layers with at most 4-bit weights in floating point."""

    patterns: tuple[str, ...] = ()

    takes: ClassVar[tuple[Stage, ...]] = (Stage.INTEGER,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "nothing"

    def find(self, program: Program) -> Findings:
        """Linear sites of at most 4 bits that a pattern matches."""
        matches = weight_only_sites(program, self.patterns)
        misses = tuple((p.site, "is not weight-only") for p in program.plan.quantised if p.site not in matches)
        return Findings(matches, misses)

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Bypasses the quantisers; the plan says that the sites run in floating point."""
        result = bypass_activation_quantisers(program, matches)
        reason = "weight-only: activations stay float as asked"
        plans = {}
        for site in matches:
            plan = program.plan[site]
            block = plan.block if plan.weight_rotated else 0
            plans[site] = replace(plan, weight_bits=None, activation_bits=None, block=block, reason=reason)
        return result.evolve(plan=program.plan.with_sites(plans))


def weight_only_sites(program: Program, patterns: Sequence[str]) -> tuple[str, ...]:
    """The quantised linear sites of at most 4-bit weights that a wildcard matches; asymmetric codes do not fit INT4.

    Raises:
        ExportError: naming a wildcard that matches none.
    """
    kinds = {site.site: site for site in quantised_sites(program)}
    fitting = [
        plan.site
        for plan in program.plan.quantised
        if plan.weight_code_bits <= 4 and plan.weight_symmetric and plan.site in kinds and _is_linear(kinds[plan.site])
    ]
    for pattern in patterns:
        if not any(names_site(pattern, site) for site in fitting):
            raise ExportError(
                f"weight-only {pattern!r}",
                "matches no linear layer with symmetric 4-bit weights",
                "See `hqc inspect PROGRAM`.",
            )
    return tuple(site for site in fitting if any(names_site(pattern, site) for pattern in patterns))


def _is_linear(site: QuantisedSite) -> bool:
    return any(is_op(p.node, ops.int_linear.default) for p in site.products) or is_op(site.layer, LINEAR)


def bypass_activation_quantisers(program: Program, sites: Sequence[str]) -> Program:
    """The program with some sites reading their input as it is, at any stage that has quantisers."""
    edit = rewrite(program)
    for site in [s for s in quantised_sites(program.evolve(graph=edit.graph)) if s.site in sites]:
        if site.real is None:
            _float_linear(edit, site)
        else:
            x: fx.Node = site.layer.args[0]  # type: ignore[assignment]
            site.layer.replace_input_with(x, _float_input(site, rotated_back=is_op(x, ops.hadamard.default)))
    return edit.finish()


def _float_input(site: QuantisedSite, *, rotated_back: bool) -> fx.Node:
    """What a layer reads without its quantiser: rotated where the weight is."""
    return site.x if rotated_back else site.quantiser.args[0]  # type: ignore[return-value]


def _float_linear(edit: Rewriter, site: QuantisedSite) -> None:
    """rescale(int_linear(q, w·H), s_a, s_w/√b, bias) -> linear(x, dequantize(w, s_w), bias)."""
    layer, product = site.layer, site.products[0].node
    back = rotation_within(product.args[1])
    block = back.block if back else 1
    folded = edit.program.state[str(layer.args[2].target)]  # type: ignore[union-attr]
    codes = edit.weight(f"{site.site}.weight_codes", stored_codes(edit.program, product.args[1]), layer)  # type: ignore[arg-type]
    scale = edit.weight(f"{site.site}.weight_scale", folded * block**0.5, layer)
    meta = {"shape": codes.meta["shape"], "dtype": "float32", "site": site.site, "role": "weight"}
    weight = edit.call(layer, ops.dequantize.default, codes, scale, **meta)
    x = _float_input(site, rotated_back=back is not None)
    linear = edit.call(layer, LINEAR, x, weight, layer.args[3], like=layer, site=site.site, role="layer")
    layer.replace_all_uses_with(linear)
    layer.meta["role"] = "replaced"


def refuse_wide_codes(program: Program) -> None:
    """Codes have to fit int8 with zero at 0: TensorRT has no zero points and no uint8.

    An asymmetric quantiser of at most 7 bits fits as it is: its codes q − z lie in −z…2ⁿ−1−z, and real 0 is code 0, so
    that zero padding stays exact. One of 8 bits has codes that do not.

    Raises:
        ExportError: naming the first quantiser that does not fit.
    """
    for node in program.graph.nodes:
        if not is_op(node, *QUANTISERS, *FAKE_QUANTISERS):
            continue
        bounds = bounds_of(node, program)
        low, high = bounds.low, bounds.high
        site = node.meta.get("site", node.name)
        if low > 0 or high < 0:
            raise ExportError(
                f"site {site}", f"its codes {low}…{high} leave out 0, so that zero padding has no code", _SYMMETRIC
            )
        if low < -128 or high > 127:
            raise ExportError(
                f"site {site}",
                f"an asymmetric quantiser with codes {low}…{high} does not fit int8 without a zero point, which "
                "TensorRT refuses",
                _SYMMETRIC,
            )


_SYMMETRIC = "Quantise symmetrically, or asymmetrically with at most 7 bits."
