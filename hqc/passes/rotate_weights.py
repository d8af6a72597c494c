"""Rotate integer weights by H: the rotation back moves from the activation into the integer weight.

    before   y = op(Ĥ·DQ(q; s_a), DQ(w_q; s_w)) + bias
    after    y = int_op(q, w_q·H_b)·(s_w/√b)·s_a + bias

(Ĥ·x̂)·Ŵᵀ = x̂·(Ŵ·Ĥ)ᵀ because Ĥ is symmetric, and Ĥ = H_b/√b with H_b = ±1, so w_q·H_b stays an integer. H mixes
channels of one pixel only: stride, padding and kernel size are untouched (code 0 is real 0). Where nothing is rotated
back (an unrotated site, or one whose weight was rotated before it was quantised) b = 1. The codes that are stored stay
w_q (4 bits fit in 4 bits); the product is an expression in the graph, folded when a runtime loads it. Source: HQ-DM
integer path; exact, no approximation.

    int32 accumulators   max_o Σ|w_q·H|·max|q| < 2^31 is checked; a site that breaks it is a miss with the reason
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hqc.errors import PassError
from hqc.passes.rewriting import CONV, Rewriter, channel_axis, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage, is_op
from hqc.rotations import Rotation
from hqc.sites import quantised_sites, rotation_of

__all__ = ["RotateWeights", "rotated_codes"]

ops = torch.ops.hqc
_INT32_LIMIT = 2**31


def rotated_codes(program: Program, site: str, rotation: Rotation | None) -> Tensor:
    """w_q·H_b of a site in int16; w_q itself where nothing is rotated back."""
    codes = _codes(program, site)
    return ops.rotate_codes(codes, *rotation) if rotation else codes.to(torch.int16)  # type: ignore[no-any-return]


def _rotated_back(layer: fx.Node) -> Rotation | None:
    """By what a frozen layer's activation is rotated back: the graph tells, since a weight may be rotated instead."""
    x = layer_inputs(layer)[0]
    return rotation_of(x) if is_op(x, ops.hadamard.default) else None


def _codes(program: Program, site: str) -> Tensor:
    if f"{site}.weight_packed" in program.state:
        raise PassError(site, "its codes are packed already", "Run pack_int4 after every other pass.")
    return program.state[f"{site}.weight_codes"]


@dataclass(frozen=True)
class RotateWeights:
    """Turns every frozen site into an integer product."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.INTEGER,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Frozen sites whose accumulators fit int32."""
        matches, misses = [], []
        layers = dict(program.sites())
        largest = {site.site: site.bounds.largest for site in quantised_sites(program)}
        for plan in program.plan.sites:
            if not plan.quantised:
                misses.append((plan.site, f"float: {plan.reason}"))
                continue
            if plan.grouped:
                misses.append((plan.site, "scales of groups: no integer product of whole rows"))
                continue
            if is_op(layers[plan.site], ops.rescale.default):
                misses.append((plan.site, "is an integer product already"))
                continue
            bound = _accumulator_bound(program, plan.site, _rotated_back(layers[plan.site])) * largest[plan.site]
            if bound >= _INT32_LIMIT:
                misses.append((plan.site, f"accumulators reach {bound}, past int32"))
            else:
                matches.append(plan.site)
        return Findings(tuple(matches), tuple(misses))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Replaces op, both dequantisers and the rotation back."""
        edit = rewrite(program)
        largest = {site.site: site.bounds.largest for site in quantised_sites(program)}
        for site in matches:
            _make_integer(edit, site, largest[site])
        return edit.finish()


def _accumulator_bound(program: Program, site: str, rotation: Rotation | None) -> int:
    """max_o Σ|w_q·H|, or a number above it that is small enough for any activation: Σ|w_q·H| ≤ b·Σ|w_q|."""
    codes, block = _codes(program, site), rotation.block if rotation else 1
    quick = 128 * block * codes[0].numel()
    if quick * 128 < _INT32_LIMIT:
        return quick
    # Added in int32, whose 2³¹ are 2²⁴ codes of 128 a row: a seventh of the time that torch's int64 takes.
    simple = int(codes.to(torch.int32).abs().flatten(1).sum(1, dtype=torch.int32).max()) * block
    if simple * 128 < _INT32_LIMIT:
        return simple
    return int(rotated_codes(program, site, rotation).to(torch.int64).abs().flatten(1).sum(1).max())


def _make_integer(edit: Rewriter, site: str, top: int) -> None:
    """top: the largest |code| of its activations."""
    layer, state = edit.layers[site], edit.program.state
    x, weight, bias = layer_inputs(layer)
    rotation = _rotated_back(layer)
    real = x.args[0] if rotation else x
    codes, scale_a = real.args  # type: ignore[union-attr]
    stored, scale_w = weight.args
    wide = stored
    if rotation:
        meta = {"shape": stored.meta["shape"], "dtype": "int16", "site": site, "role": "weight"}  # type: ignore[union-attr]
        wide = edit.call(layer, ops.rotate_codes.default, stored, rotation.block, *rotation.flag, **meta)
        # s_w/√b is formed once here, in float32, so that every runtime multiplies by the same number.
        folded = state[str(scale_w.target)] * rotation.block**-0.5  # type: ignore[union-attr]
        scale_w = edit.weight(f"{site}.weight_rotated_scale", folded, layer)
    if is_op(layer, CONV):
        geometry = [list(layer.args[i]) if len(layer.args) > i else default for i, default in _GEOMETRY]  # type: ignore[arg-type]
        acc = edit.call(layer, ops.int_conv2d.default, codes, wide, *geometry, top, like=layer, site=site)
    else:
        acc = edit.call(layer, ops.int_linear.default, codes, wide, top, like=layer, site=site)
    acc.meta |= {"dtype": "int32", "role": "product"}
    out = edit.call(
        layer,
        ops.rescale.default,
        acc,
        scale_a,
        scale_w,
        bias,
        channel_axis(layer),
        like=layer,
        site=site,
        role="layer",
    )
    layer.replace_all_uses_with(out)
    layer.meta["role"] = "replaced"


_GEOMETRY = ((3, [1, 1]), (4, [0, 0]), (5, [1, 1]))
