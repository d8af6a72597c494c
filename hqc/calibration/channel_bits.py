"""Bits by output channel: a bit more for the channels whose weights have the heaviest tails, one less for the lightest.

    κ_o = E[(w - μ)⁴]/σ⁴ of a channel's weights                 kurtosis
    b_o = n + 1 for the k largest κ, n - 1 for the k smallest, n for the rest: n in the mean, exactly
    k   = argmin Σ ‖(Q_b(W) - W)·x‖²,  k ∈ {0, O/10, 2·O/10, …, O/2}     over rows of x at some timesteps

Ranges span a channel's weights and 0. A channel's error depends on its own bits alone, so that three errors a channel
give those of every k. Source: outlier-driven mixed quantisation of MPQ-DM (arXiv 2412.11549); its released code tries
k ∈ {0, O/10} on one batch.

A residual weight gives its salient channels, those of the largest κ, n bits and a binary code more instead of n + 1:

    Ŵ_o = Q_n(W_o) + α_o·sign(W_o - Q_n(W_o)),  α_o = mean |W_o - Q_n(W_o)|,  the least error that a sign can leave

Its step is free, and the grid of the rest stays: MPQ-DMv2 (arXiv 2507.04290), of which no formula was seen.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hqc.calibration.site_rows import collect_for, require_rows
from hqc.calibration.weights import source_weight
from hqc.passes.insert_qdq import spanning_range
from hqc.passes.rewriting import layer_inputs
from hqc.plan import SitePlan
from hqc.program import Program, Stage
from hqc.sampling import Work
from hqc.stages import each
from hqc.steps import check_options

__all__ = ["MixChannelBits", "channel_bits", "kurtosis", "residual_step"]

_CHANGES = (-1, 0, 1)


@dataclass(frozen=True)
class MixChannelBits:
    """Chooses the bits of the output channels of every mixed weight, their ranges and steps of binary codes.

    parts: k is a multiple of the channels' 1/parts. samples: images of the float trajectory; timesteps: how many of its
    steps are measured, evenly spread, on `rows` rows each. seed: of noise, conditions and rows.
    """

    parts: Annotated[int, Field(ge=2, le=1000)] = 10
    samples: Annotated[int, Field(ge=1, le=4096)] = 8
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 5
    rows: Annotated[int, Field(ge=1, le=65536)] = 64
    seed: Annotated[int, Field(ge=0)] = 2024

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    samples_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, program: Program, work: Work) -> None:
        """See `require_rows`."""
        require_rows(self, program, work, "mixing bits")

    def run(self, program: Program, work: Work) -> Program:
        """The program with other bits, scales and zero points of its mixed weights; the plan says how many changed.

        Raises:
            TrainingError: where the sampler meets NaN.
        """
        layers, state, plans = dict(program.sites()), dict(program.state), {}
        mixed = [plan for plan in program.plan.quantised if plan.weight_mixed]
        if not mixed:  # wide operands have none
            return program
        inputs = {plan.site: layer_inputs(layers[plan.site])[0] for plan in mixed}
        seen = collect_for(self, program, inputs, work, "mixing bits")
        weights = {plan.site: state[source_weight(layer_inputs(layers[plan.site])[1])] for plan in mixed}
        for plan in each("mixing bits of sites", mixed, lambda plan: weights[plan.site].numel()):
            weight = weights[plan.site]
            own, rows = plan.weight_bits or 8, torch.cat(seen[plan.site].rows)
            bits = channel_bits(weight, rows, own, self.parts, residual=plan.weight_residual)
            plans[plan.site], salient = _explained(plan, bits), bits > own
            top = torch.exp2(bits.clamp_max(own) if plan.weight_residual else bits) - 1
            found = {"top": top, **dict(zip(("scale", "zero"), spanning_range(weight, top), strict=True))}
            if plan.weight_residual:
                step = residual_step(weight, found["scale"], found["zero"], top)
                found |= {"residual_scale": step, "salient": salient.to(step.dtype)}
            state |= {f"{plan.site}.weight_{leaf}": tensor for leaf, tensor in found.items()}
        return program.evolve(state=state, plan=program.plan.with_sites(plans))

    def cost(self, program: Program, work: Work) -> float:
        """One trajectory of every image; the choice is made on rows."""
        return float(work.evaluations(self.samples))


def _explained(plan: SitePlan, bits: Tensor) -> SitePlan:
    changed = int((bits > (plan.weight_bits or 8)).sum())
    note = f"all {len(bits)} channels with {plan.weight_bits} bits"
    if changed:
        more = "binary codes more" if plan.weight_residual else "a bit more"
        note = f"{changed} of {len(bits)} channels with {more}, {changed} with one less"
    return replace(plan, reason="; ".join(text for text in (plan.reason, note) if text))


@torch.no_grad()
def channel_bits(weight: Tensor, rows: Tensor, bits: int, parts: int, *, residual: bool = False) -> Tensor:
    """Bits [O] of a weight [O, …] that is read with rows [n, K]; `bits` in the mean.

    residual: what is more than `bits` is a binary code beside as many.
    """
    flat = weight.flatten(1).to(torch.float32)
    channels = len(flat)
    order = kurtosis(flat).sort(stable=True).indices
    fewer, same, more = (_errors(flat, rows, bits + change)[order] for change in _CHANGES)
    if residual:
        more = _errors(flat, rows, bits, residual=True)[order]

    def error(k: int) -> float:
        return float(fewer[:k].sum() + same[k : channels - k].sum() + more[channels - k :].sum())

    best = min(sorted({channels * part // parts for part in range(parts // 2 + 1)}), key=error)
    chosen = torch.full((channels,), float(bits))
    chosen[order[:best]] -= 1
    chosen[order[channels - best :]] += 1
    return chosen


def _errors(weight: Tensor, rows: Tensor, bits: int, *, residual: bool = False) -> Tensor:
    """Σ ((Q(W_o) - W_o)·x)² [O] of a weight [O, K], every channel with that many bits, and a binary code beside."""
    top = torch.full((len(weight),), 2.0**bits - 1)
    scale, zero = spanning_range(weight, top)
    step = residual_step(weight, scale, zero, top) if residual else torch.zeros_like(scale)
    difference: Tensor = torch.ops.hqc.fake_quantize_residual(weight, scale, -zero, top - zero, step) - weight
    return (rows @ difference.T).double().square().sum(0)


@torch.no_grad()
def residual_step(weight: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
    """α_o = mean |W_o - Q(W_o)| [O] of a weight [O, …]; 1 for a channel of which nothing is left."""
    flat = weight.flatten(1).to(torch.float32)
    left = (flat - torch.ops.hqc.fake_quantize_bounded(flat, scale, -zero, top - zero)).abs().mean(1)
    return torch.where(left > 0, left, torch.ones_like(left))


def kurtosis(weight: Tensor) -> Tensor:
    """E[(w - μ)⁴]/σ⁴ [O] of the rows of [O, K]; 0 of a row of one value."""
    centred = weight.double() - weight.double().mean(1, keepdim=True)
    variance = centred.square().mean(1)
    found = centred.pow(4).mean(1) / variance.square()
    return torch.where(variance > 0, found, torch.zeros_like(found))
