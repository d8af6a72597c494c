"""Insert smoothing: every channel of a site's input has a factor of its own, which its weight takes back.

    before   y = op(x, W) + b
    after    y = op(x·λ⁻¹, λ·W) + b                     λ [C] one positive factor an input channel
    shifted  y = op((x - δ)·λ⁻¹, λ·W) + (b + W·δ)       δ [C] one shift an input channel

λ·W is stored as the site's own weight, λ⁻¹ as `SITE.smoothing`, δ as `SITE.shift`, both shaped to meet x, and b + W·δ
as `SITE.bias_shifted`. Factors start at one and shifts at zero, so nothing changes; `smooth` chooses them. Every site
has its own, also where several read one tensor.

A shift goes in front of linear layers and of 1×1 convolutions without padding: where zeros are padded, op(δ, W) is less
at the borders than in the middle, and no bias takes it back. Other sites keep δ = 0 and have none.
Source: SmoothQuant (arXiv 2211.10438), as SVDQuant and MPQ-DM use it; with shifts PassionSR (arXiv 2411.17106), LET.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, fx

from hqc.passes.rewriting import CONV, Rewriter, asked_sites, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.plan import SitePlan
from hqc.program import Program, Stage, aten, is_op
from hqc.steps import Within, check_options

__all__ = ["InsertSmoothing", "output_shift", "takes_shift"]


@dataclass(frozen=True)
class InsertSmoothing:
    """Puts a factor a channel in front of every quantised site but the 8-bit edge layers, before any rotation.

    shift: a shift a channel too, where the layer's bias can take it back exactly. most_bits: sites whose activations
    have more stay as they are.
    """

    shift: bool = False
    most_bits: Annotated[int, Within(ge=2, le=8)] = 8

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def __post_init__(self) -> None:
        check_options(self)

    def find(self, program: Program) -> Findings:
        """Sites that are quantised at the asked bits."""
        return asked_sites(program, self._unfit)

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts the multiplications and gives every site a weight of its own."""
        edit, plans = rewrite(program), {}
        for site in matches:
            layer = edit.layers[site]
            x, weight, _ = layer_inputs(layer)
            value, channels = program.state[str(weight.target)], program.plan[site].in_channels
            shape = (channels, 1, 1) if is_op(layer, CONV) else (channels,)
            shifts = self.shift and takes_shift(layer, value)
            shifted = _shifted(edit, site, layer, value, shape) if shifts else x
            factors = edit.weight(f"{site}.smoothing", torch.ones(shape, dtype=value.dtype), layer)
            smooth = edit.call(layer, aten.mul.Tensor, shifted, factors, like=x, site=site, role="smoothing")
            layer.replace_input_with(x, smooth)
            layer.replace_input_with(weight, edit.weight(f"{site}.weight_smoothed", value, layer))
            plans[site] = replace(program.plan[site], smoothed=True, shifted=shifts)
        return edit.finish(plan=program.plan.with_sites(plans))

    def _unfit(self, plan: SitePlan) -> str:
        if plan.smoothed:
            return "is smoothed already"
        if (plan.activation_bits or 8) > self.most_bits:
            return f"its activations have {plan.activation_bits} bits, more than {self.most_bits}"
        return "is rotated already: run insert_smoothing before insert_hadamard" if plan.block else ""


def takes_shift(layer: fx.Node, weight: Tensor) -> bool:
    """Whether a layer's bias takes back a shift of its input: linear, or 1×1 without padding and groups."""
    if not is_op(layer, CONV):
        return True
    padding: Any = layer.args[4] if len(layer.args) > 4 else (0, 0)
    groups: Any = layer.args[6] if len(layer.args) > 6 else 1
    return math.prod(weight.shape[2:]) == 1 and not any(padding) and groups == 1


def output_shift(weight: Tensor, shift: Tensor) -> Tensor:
    """W·δ [O]: what a shift of its input does to the output of a layer that takes one."""
    return weight.flatten(1).mv(shift.flatten())


def _shifted(edit: Rewriter, site: str, layer: fx.Node, weight: Tensor, shape: tuple[int, ...]) -> fx.Node:
    """x - δ in front of a layer, whose bias becomes the site's own."""
    x, _, bias = layer_inputs(layer)
    stored = edit.weight(f"{site}.shift", torch.zeros(shape, dtype=weight.dtype), layer)
    value = edit.state[str(bias.target)] if bias is not None else torch.zeros(len(weight), dtype=weight.dtype)
    own = edit.weight(f"{site}.bias_shifted", value, layer)
    layer.args = (*layer.args[:2], own, *layer.args[3:])
    return edit.call(layer, aten.sub.Tensor, x, stored, like=x, site=site, role="shift")
