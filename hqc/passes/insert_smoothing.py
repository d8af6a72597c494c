"""Insert smoothing: every channel of a site's input has a factor of its own, which its weight takes back.

    before   y = op(x, W)
    after    y = op(x·λ⁻¹, λ·W),  λ [C] one positive factor an input channel

λ·W is stored as the site's own weight, λ⁻¹ as `SITE.smoothing`, shaped to multiply x. Factors start at one, so nothing
changes; `smooth` chooses them. Every site has its own, also where several read one tensor.
Source: SmoothQuant (arXiv 2211.10438), as SVDQuant and MPQ-DM use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from hqc.passes.rewriting import CONV, asked_sites, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.plan import SitePlan
from hqc.program import Program, Stage, aten, is_op

__all__ = ["InsertSmoothing"]


@dataclass(frozen=True)
class InsertSmoothing:
    """Puts a factor a channel in front of every quantised site but the 8-bit edge layers, before any rotation."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Sites that are quantised at the asked bits."""
        return asked_sites(program, _unfit)

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts the multiplications and gives every site a weight of its own."""
        edit, plans = rewrite(program), {}
        for site in matches:
            layer = edit.layers[site]
            x, weight, _ = layer_inputs(layer)
            value, channels = program.state[str(weight.target)], program.plan[site].in_channels
            shape = (channels, 1, 1) if is_op(layer, CONV) else (channels,)
            factors = edit.weight(f"{site}.smoothing", torch.ones(shape, dtype=value.dtype), layer)
            smooth = edit.call(layer, aten.mul.Tensor, x, factors, like=x, site=site, role="smoothing")
            layer.replace_input_with(x, smooth)
            layer.replace_input_with(weight, edit.weight(f"{site}.weight_smoothed", value, layer))
            plans[site] = replace(program.plan[site], smoothed=True)
        return edit.finish(plan=program.plan.with_sites(plans))


def _unfit(plan: SitePlan) -> str:
    if plan.smoothed:
        return "is smoothed already"
    return "is rotated already: run insert_smoothing before insert_hadamard" if plan.block else ""
