"""Weight scales by MSE search: per output channel the scale whose codes are nearest to the weights."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from hqc.bounds import bounds_of
from hqc.ops.grouped import by_group
from hqc.passes.insert_qdq import residual_step_of, spanning_range, weight_top
from hqc.passes.rewriting import layer_inputs
from hqc.program import Program, Stage, is_op
from hqc.sampling import Work
from hqc.stages import each
from hqc.steps import check_options

__all__ = [
    "CalibrateWeights",
    "mse_weight_scale",
    "quantised_weight",
    "searched_range",
    "source_weight",
    "symmetric_weight_scale",
    "with_symmetric_scale",
]


@dataclass(frozen=True)
class CalibrateWeights:
    """Scales that minimise ‖W_o - s·clip(round(W_o/s))‖² for every output channel of every quantised weight.

    An asymmetric range spans the channel's values and 0 instead, or with `asymmetric="search"` the share of that span
    that gives the least error; weights with binary codes besides keep what those were chosen for. Scales of tables are
    `fit_lookup`'s, and stay.
    candidates: how many scales are tried a channel, or a group of input channels where such have scales, see
    `mse_weight_scale`; 1: max|W| over the largest code, as it is.
    """

    candidates: Annotated[int, Field(ge=1, le=1000)] = 80
    asymmetric: Literal["span", "search"] = "span"

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    samples_denoiser: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, program: Program, work: Work) -> None:
        """Nothing that could be known before."""

    def run(self, program: Program, work: Work) -> Program:
        """The program with other weight scales."""
        layers, state = dict(program.sites()), dict(program.state)
        searched = [plan for plan in program.plan.quantised if not plan.weight_lookup]
        quantisers = {plan.site: layer_inputs(layers[plan.site])[1] for plan in searched}
        weights = {site: state[source_weight(quantiser)] for site, quantiser in quantisers.items()}
        for plan in each("calibrating weights", searched, lambda plan: weights[plan.site].numel()):
            bounds, weight = bounds_of(quantisers[plan.site], program), weights[plan.site]
            if not plan.weight_symmetric:
                by_search = self.asymmetric == "search"
                if by_search and plan.weight_residual:
                    continue
                tops = weight_top(plan, state)
                found = searched_range(weight, tops, self.candidates) if by_search else spanning_range(weight, tops)
                state[f"{plan.site}.weight_scale"], state[f"{plan.site}.weight_zero"] = found
                continue
            ends = bounds.low, bounds.high
            scale = symmetric_weight_scale(weight, *ends, self.candidates, plan.weight_group)
            state[f"{plan.site}.weight_scale"] = scale
        return program.evolve(state=state)

    def cost(self, program: Program, work: Work) -> float:
        """The denoiser is not run."""
        return 0.0


def source_weight(quantiser: fx.Node) -> str:
    """The name of the weight that a quantiser reads; a LoRA beside it starts at zero."""
    weight = quantiser.args[0]
    if weight.meta.get("role") == "lora":  # type: ignore[union-attr]
        weight = weight.args[0]  # type: ignore[union-attr]
    return str(weight.target)  # type: ignore[union-attr]


@torch.no_grad()
def quantised_weight(program: Program, quantiser: fx.Node, weight: Tensor) -> Tensor:
    """What a quantiser of a program makes of some weight."""
    bounds, scale = bounds_of(quantiser, program), program.state[str(quantiser.args[1].target)]  # type: ignore[union-attr]
    if bounds.lookups is None:
        return quantiser.target(weight, scale, *quantiser.args[2:])  # type: ignore[no-any-return, operator]
    step = torch.zeros_like(scale)
    if is_op(quantiser, torch.ops.hqc.fake_quantize_residual.default):
        step = residual_step_of(program, quantiser)
    ends = bounds.lookups.lows, bounds.lookups.highs
    return torch.ops.hqc.fake_quantize_residual(weight, scale, *ends, step)  # type: ignore[no-any-return]


@torch.no_grad()
def searched_range(weight: Tensor, top: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point per output channel [O] of least Σ(Q(W_o) - W_o)² over shares of its span and 0.

    Shares are even in (0.2, 1], one candidate is the whole span; in large layers not all are tried, see
    `mse_weight_scale`. Both ends shrink alike, so that the zero point is that of `spanning_range`; top: of the codes, a
    number or [O].
    """
    flat = weight.flatten(1).to(torch.float32)
    whole, zero = spanning_range(weight, top)
    low, high = (-zero).unsqueeze(1), (top - zero).unsqueeze(1)
    ratios = torch.linspace(0.2, 1.0, candidates + 1)[1:]
    step = _coarse(flat, float(top.max()) / 2, candidates)
    parts = [
        _best_scale(flat[rows], whole[rows], low[rows], high[rows], ratios, step)
        for rows in torch.split(torch.arange(len(flat)), _rows_at_once(flat))
    ]
    return torch.where(flat.any(1), torch.cat(parts), whole) if parts else whole, zero


@torch.no_grad()
def symmetric_weight_scale(weight: Tensor, low: int, high: int, candidates: int, group: int) -> Tensor:
    """`mse_weight_scale` [O], or of every group of so many input channels [O, G, …] where that is not 0."""
    if not group:
        return mse_weight_scale(weight, low, high, candidates)
    grouped = by_group(weight, 1, group).movedim(2, -1)  # [O, G, …, g]
    return mse_weight_scale(grouped.reshape(-1, grouped.shape[-1]), low, high, candidates).view(grouped.shape[:-1])


@torch.no_grad()
def with_symmetric_scale(weight: Tensor, scale: Tensor, low: int, high: int, group: int) -> Tensor:
    """A weight on the grid of scales that `symmetric_weight_scale` gives."""
    if not group:
        return torch.ops.hqc.fake_quantize(weight, scale, low, high)  # type: ignore[no-any-return]
    return torch.ops.hqc.fake_quantize_grouped(weight, scale, low, high, 1, group)  # type: ignore[no-any-return]


@torch.no_grad()
def mse_weight_scale(weight: Tensor, qmin: int, qmax: int, candidates: int = 80) -> Tensor:
    """Scale per output channel [O] that minimises ‖W_o - s·clip(round(W_o/s))‖² over shrunken ranges.

    Candidates are absmax/qmax·r for r evenly in (0.2, 1.2]: above 1 because the range is asymmetric at its ends. In a
    layer of more than a million weights of at most four bits every eighth is tried, then those around the best at half,
    a quarter and an eighth of that distance. One candidate is r = 1. An all-zero channel gets scale 1, which represents
    it exactly.
    """
    flat = weight.flatten(1).to(torch.float32)
    absmax = flat.abs().amax(1) if len(flat) else flat.new_zeros(0)
    base = torch.where(absmax > 0, absmax / qmax, torch.ones_like(absmax))
    ratios = torch.linspace(0.2, 1.2, candidates + 1)[1:] if candidates > 1 else torch.ones(1)
    step, rows = _coarse(flat, qmax, candidates), _rows_at_once(flat)
    pairs = zip(torch.split(flat, rows), torch.split(base, rows), strict=True)
    parts = [_best_scale(part, own, qmin, qmax, ratios, step) for part, own in pairs]
    return torch.where(absmax > 0, torch.cat(parts), torch.ones_like(absmax)) if parts else base


_CACHED_VALUES = 2**20
_LARGE_LAYER = 2**20


def _rows_at_once(flat: Tensor) -> int:
    """Some at a time: every candidate goes over them again, in the cache."""
    return max(1, _CACHED_VALUES // max(1, flat.shape[1]))


def _coarse(flat: Tensor, top: float, candidates: int) -> int:
    """How far apart the candidates are that are tried first; top: of codes of a range with both signs."""
    return 8 if flat.numel() > _LARGE_LAYER and top < 8 and candidates > 8 else 1


def _best_scale(flat: Tensor, base: Tensor, low: int | Tensor, high: int | Tensor, ratios: Tensor, step: int) -> Tensor:
    """Of the ratios of the base [R] that with the least error for each row; low, high: codes, numbers or [R, 1]."""
    best = torch.zeros(len(flat), dtype=torch.int64)
    best_error = torch.full_like(base, torch.inf)

    def attempt(index: Tensor) -> None:
        scale = (base * ratios[index]).unsqueeze(1)
        levels = (flat * scale.reciprocal()).round_()
        error = levels.clamp_(low, high).mul_(scale).sub_(flat).square_().sum(1)  # type: ignore[arg-type]
        better = error < best_error
        best[better], best_error[better] = index[better], error[better]

    for start in range(step - 1, len(ratios), step):
        attempt(torch.full_like(best, start))
    while step := step // 2:
        middle = best.clone()
        attempt((middle - step).clamp_min(0))
        attempt((middle + step).clamp_max(len(ratios) - 1))
    return base * ratios[best]
