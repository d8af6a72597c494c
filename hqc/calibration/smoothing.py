"""Smoothing: which share of a site's outliers, channel by channel, moves from its activation into its weight.

    x̂ = x·λ⁻¹, Ŵ = λ·W,  λ_c = max|x_c|^a / max|W_c|^b         (a, b) by output error, or ½ and ½

    error(a, b) = Σ ‖Q_a(x̂)·Q_w(Ŵ - L)ᵀ + x̂·Lᵀ - x·Wᵀ‖²        over rows of x at some timesteps

L is SVD_r(Ŵ) where the site has a branch of rank r, else 0. Candidates are (0, 0), then (α, 0) and (α, 1-α) for α
evenly between 0 and 1. Only the ratios of λ matter: its geometric mean is 1, and it stays within 1/1024 … 1024, so that
half precision holds it. A channel that is zero everywhere keeps λ = 1. Source: deepcompressor's grid (SVDQuant, arXiv
2411.05007); by="max_ratio", √(max|x_c|/max|W_c|), is MPQ-DM's; by="activation_range", a = 1 and b = 0, gives every
channel one range, as a scale of its own would (QuEST, arXiv 2402.03666).

    by="timestep_range"    r_c = Σ_g ω_g·max|X_g,c|,  ω_g = max|X_g|/Σ_g max|X_g|,  λ_c = clip(r_c/min r, 1, limit)

is TCAQ-DM's (arXiv 2412.16700), for groups g of neighbouring steps: a channel counts by its size at every time of the
trajectory, and weights are not looked at. The weights ω of the groups are the project's own choice: not published.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hqc.bits import activation_range, weight_range
from hqc.calibration.low_rank import gram_of_columns, low_rank
from hqc.calibration.rotations import quantised_activation
from hqc.calibration.site_rows import SiteRows, collect_for, require_rows
from hqc.calibration.weights import symmetric_weight_scale, with_symmetric_scale
from hqc.passes.insert_smoothing import output_shift
from hqc.passes.rewriting import layer_inputs
from hqc.plan import SitePlan
from hqc.program import Program, Stage
from hqc.sampling import Work
from hqc.sites import source_of
from hqc.stages import each
from hqc.steps import check_options

__all__ = ["Smooth", "smoothing_factors", "timestep_range_factors"]

ops = torch.ops.hqc
_WEIGHT_CANDIDATES = 16
_LARGEST = 1024.0


@dataclass(frozen=True)
class Smooth:
    """Chooses the factors that `insert_smoothing` has put in front of the sites, and folds them into the weights.

    Shifts, where it has put some, become the middles of the channels' values over all steps; factors are chosen behind.

    by: "grid" measures the output error of the candidates with both operands quantised at the plan's widths, unrotated,
    in the ranges that `insert_qdq` gives them (`activation`, `weight_group` and `activation_group` are its own);
    "max_ratio" takes a = b = ½, "activation_range" a = 1 and b = 0; "timestep_range" weighs max|x| of `groups` of
    neighbouring steps, factors being 1 … `limit`. candidates: how many are tried at most. samples: images of the float
    trajectory, whose every step gives max|x|; timesteps: how many of its steps are measured, evenly spread, on `rows`
    rows each. seed: of noise, conditions and rows.
    """

    by: Literal["grid", "max_ratio", "activation_range", "timestep_range"] = "grid"
    candidates: Annotated[int, Field(ge=1, le=1000)] = 39
    samples: Annotated[int, Field(ge=1, le=4096)] = 16
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 5
    rows: Annotated[int, Field(ge=1, le=65536)] = 64
    activation: Literal["symmetric", "asymmetric", "dynamic"] = "symmetric"
    weight_group: Annotated[int, Field(ge=0)] = 0
    activation_group: Annotated[int, Field(ge=0)] = 0
    groups: Annotated[int, Field(ge=1, le=1000)] = 4
    limit: Annotated[float, Field(ge=1, le=_LARGEST)] = 10.0
    seed: Annotated[int, Field(ge=0)] = 2024

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    samples_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, program: Program, work: Work) -> None:
        """See `require_rows`; only by="grid" keeps rows."""
        require_rows(self, program, work, "smoothing", timesteps=self._measured)

    def run(self, program: Program, work: Work) -> Program:
        """The program with other factors and weights, and the same numbers.

        Raises:
            TrainingError: where the sampler meets NaN.
        """
        layers, state = dict(program.sites()), dict(program.state)
        smoothed = [plan for plan in program.plan.sites if plan.smoothed]
        if not smoothed:
            return program
        inputs = {plan.site: source_of(layers[plan.site]) for plan in smoothed}
        seen = collect_for(self, program, inputs, work, "smoothing", timesteps=self._measured)
        weights = {plan.site: str(layer_inputs(layers[plan.site])[1].target) for plan in smoothed}
        for plan in each("smoothing sites", smoothed, lambda plan: state[weights[plan.site]].numel()):
            weight, factors = weights[plan.site], f"{plan.site}.smoothing"
            original = state[weight] * _per_input(state[factors].flatten(), state[weight])
            rows = seen[plan.site]
            if plan.shifted:
                shift, bias = f"{plan.site}.shift", f"{plan.site}.bias_shifted"
                middle, rows = rows.centred()
                state[bias] = state[bias] + output_shift(original, middle - state[shift].flatten())
                state[shift] = middle.view(state[shift].shape)
            found = self._choice(plan, original, rows)
            state[weight] = original * _per_input(found, original)
            state[factors] = found.reciprocal().view(state[factors].shape)
        return program.evolve(state=state)

    def cost(self, program: Program, work: Work) -> float:
        """One trajectory of every image; the search runs on rows."""
        return float(work.evaluations(self.samples))

    @property
    def _measured(self) -> int:
        """How many steps give rows."""
        return self.timesteps if self.by == "grid" else 0

    def _choice(self, plan: SitePlan, weight: Tensor, seen: SiteRows) -> Tensor:
        if self.by == "max_ratio":
            return smoothing_factors(seen.largest, weight, 0.5, 0.5)
        if self.by == "activation_range":
            return smoothing_factors(seen.largest, weight, 1.0, 0.0)
        if self.by == "timestep_range":
            steps = torch.stack([seen.steps[step] for step in sorted(seen.steps)])
            return timestep_range_factors(steps, self.groups, self.limit)
        site = _Site(plan, weight, seen.rows, self)
        tried = (smoothing_factors(seen.largest, weight, *pair) for pair in _pairs(self.candidates))
        return min(tried, key=site.error)


def _pairs(candidates: int) -> Iterator[tuple[float, float]]:
    """(a, b) of the candidates."""
    yield 0.0, 0.0
    count = candidates // 2
    for index in range(1, count + 1):
        alpha = index / (count + 1)
        yield alpha, 0.0
        yield alpha, 1 - alpha


def smoothing_factors(largest: Tensor, weight: Tensor, a: float, b: float) -> Tensor:
    """λ [C] = max|x_c|^a / max|W_c|^b, in the middle 1; largest: max|x_c| [C]."""
    of_weight = weight.abs().transpose(0, 1).flatten(1).amax(1)
    found = largest.pow(a) / of_weight.pow(b)
    usable = (largest > 0) & (of_weight > 0)
    if not bool(usable.any()):
        return torch.ones_like(largest)
    middle = found[usable].log().mean().exp()
    return torch.where(usable, (found / middle).clamp(1 / _LARGEST, _LARGEST), torch.ones_like(found))


def timestep_range_factors(steps: Tensor, groups: int, limit: float) -> Tensor:
    """λ [C] = clip(r_c/min r, 1, limit), r_c = Σ_g ω_g·max|x_g,c|; steps: max|x_c| at each [T, C].

    A channel of zeros keeps λ = 1.
    """
    largest = torch.stack([group.amax(0) for group in torch.tensor_split(steps, min(groups, len(steps)))])
    weights = largest.amax(1, keepdim=True)
    found = (weights / weights.sum().clamp_min(torch.finfo(steps.dtype).tiny) * largest).sum(0)
    usable = found > 0
    if not bool(usable.any()):
        return torch.ones_like(found)
    return torch.where(usable, (found / found[usable].min()).clamp(1, limit), torch.ones_like(found))


def _per_input(factors: Tensor, weight: Tensor) -> Tensor:
    """Factors [C] shaped to multiply a weight [O, C, …]."""
    return factors.view(1, -1, *[1] * (weight.ndim - 2))


class _Site:
    """A site while candidates are tried: all that does not depend on them is computed once."""

    @torch.no_grad()
    def __init__(self, plan: SitePlan, weight: Tensor, rows: Sequence[Tensor], step: Smooth) -> None:
        self._plan, self._rows, self._step, self._shape = plan, rows, step, weight.shape
        self._flat, self._window = weight.flatten(1), weight[0, 0].numel()
        self._wanted = torch.cat(list(rows)) @ self._flat.T
        tall = self._flat.shape[0] >= self._flat.shape[1]
        self._gram = gram_of_columns(self._flat) if plan.branch_rank and tall else None

    @torch.no_grad()
    def error(self, factors: Tensor) -> float:
        """Σ‖Q_a(x̂)·Q_w(Ŵ - L)ᵀ + x̂·Lᵀ - x·Wᵀ‖²; L is the branch's, as far as the site has one."""
        wide = factors.repeat_interleave(self._window)
        smooth, scaled = self._flat * wide, [x / wide for x in self._rows]
        found = torch.cat([self._quantised_rows(x) for x in scaled])
        if not self._plan.branch_rank:
            return _energy(found @ self._quantised_weight(smooth).T - self._wanted)
        up, down = low_rank(smooth, self._plan.branch_rank, self._gram_of(wide))
        made = found @ self._quantised_weight(smooth - up @ down).T
        return _energy(made + torch.cat(scaled) @ down.T @ up.T - self._wanted)

    def _gram_of(self, factors: Tensor) -> Tensor | None:
        """ŴᵀŴ = λλᵀ∘WᵀW, where that is the smaller one."""
        if self._gram is None:
            return None
        factors = factors.to(self._gram.dtype)
        return self._gram * factors * factors.unsqueeze(1)

    def _quantised_rows(self, rows: Tensor) -> Tensor:
        """x̂ [n, K] of rows that are windows [C, …] of the input."""
        step, bits = self._step, self._plan.activation_bits or 8
        if step.activation != "dynamic":
            return quantised_activation(rows, bits, step.activation)
        x, (low, high) = rows.view(-1, *self._shape[1:]), activation_range(bits)
        groups = 1, step.activation_group or self._plan.in_channels
        scale = ops.dynamic_scale(x, high, *groups)
        return ops.fake_quantize_grouped(x, scale, low, high, *groups).flatten(1)  # type: ignore[no-any-return]

    def _quantised_weight(self, weight: Tensor) -> Tensor:
        """Ŵ [O, K] as calibration would quantise it; scales of groups are as large as their values need."""
        weight, ends, group = (
            weight.view(self._shape),
            weight_range(self._plan.weight_bits or 8),
            self._step.weight_group,
        )
        scale = symmetric_weight_scale(weight, *ends, 1 if group else _WEIGHT_CANDIDATES, group)
        return with_symmetric_scale(weight, scale, *ends, group).flatten(1)


def _energy(x: Tensor) -> float:
    return float(x.square().sum())
