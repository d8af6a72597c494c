"""Which rotation suits which site: the one whose quantised activations change the layer's output least.

    error(R) = Σ_t ‖op(R⁻¹·Q_a(R·x; s_t) - x, W)‖² / Σ_t ‖op(x, W)‖²,  s_t = argmin ‖Q_a(R·x; s_t) - R·x‖²

R runs over the candidates, the identity among them, t over timesteps. A large order spreads
outliers further, but makes every value a sum of more; which of both wins depends on the site. Source: own.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from hqc.bits import HIGHEST_ASYMMETRIC_BITS, activation_range, asymmetric_top, weight_range
from hqc.calibration.searches import activation_search, some_values
from hqc.calibration.watching import WatchedRun
from hqc.calibration.weights import mse_weight_scale
from hqc.errors import PlanError
from hqc.memory import require_call_memory
from hqc.passes import InsertHadamard
from hqc.passes.insert_qdq import Range
from hqc.passes.rewriting import channel_axis, layer_inputs
from hqc.passes.split_digits import digit_limit
from hqc.pipeline import run_pass
from hqc.plan import SitePlan
from hqc.program import Program, Stage
from hqc.rotations import KINDS, ORDERS, Rotation
from hqc.sampling import Work, evenly
from hqc.site_rules import deciding
from hqc.steps import check_options

__all__ = ["ChooseRotation", "free_sites", "quantised_activation"]

Candidate = tuple[str, int]
"""Kind and order of a rotation."""

_NONE: Candidate = ("none", 0)
_WEIGHT_CANDIDATES, _SCALE_CANDIDATES = 16, 30


@dataclass(frozen=True)
class ChooseRotation:
    """Measures the candidates at every site and inserts the best, or none where nothing is better.

    candidates: (kind, order); those that do not divide a site's channels are not tried there. samples: images of the
    float trajectory; timesteps: how many of its steps are measured, evenly spread. tie: the share by which the error
    must be lower than that of a cheaper candidate; second_digit: the same for weights that need a second int8 product
    once they are rotated. seed: of noise and conditions.
    """

    candidates: tuple[tuple[str, int], ...] = (
        *(("sylvester", 8), ("regular", 16), ("sylvester", 32), ("regular", 32)),
        *(("regular", 64), ("sylvester", 128)),
    )
    samples: Annotated[int, Field(ge=1, le=4096)] = 4
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 5
    tie: Annotated[float, Field(ge=0, le=1)] = 0.01
    second_digit: Annotated[float, Field(ge=0, le=1)] = 0.05
    seed: Annotated[int, Field(ge=0)] = 2024
    activation: Range = "symmetric"

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    samples_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)
        for kind, order in self.candidates:
            if kind not in KINDS or order not in ORDERS[kind]:
                there = "; ".join(f"{one} {', '.join(map(str, ORDERS[one]))}" for one in KINDS)
                raise PlanError("choose_rotation", f"no rotation is {kind} of order {order}", f"There are {there}.")

    def check(self, program: Program, work: Work) -> None:
        """All images are one batch, twice as large with guidance.

        Raises:
            MemoryShortError: if that does not fit.
        """
        what, do = f"choosing rotations on {self.samples} images", "Take fewer images (--set choose_rotation.samples=2)"
        require_call_memory(what, program, self.samples * work.halves(), do)

    def run(self, program: Program, work: Work) -> Program:
        """The program with a rotation of its own at every site; the plan has every candidate's error as the reason.

        Raises:
            TrainingError: where the sampler meets NaN.
        """
        if not free_sites(program):
            return run_pass(program, InsertHadamard(block=0))
        watcher = _Watcher(program, self.candidates, self.activation)
        steps = len(work.sampled.scheduler(work.sampler.num_inference_steps).timesteps)
        measured = set(evenly(self.timesteps, steps))
        for step in work.walk("choosing rotations", watcher, self.samples, self.seed):
            watcher.measuring = step in measured
        errors = watcher.errors
        chosen = {site: self._choice(program, program.plan[site], found) for site, found in errors.items()}
        sites = tuple((site, *(choice if choice != _NONE else (KINDS[0], 0))) for site, choice in chosen.items())
        rotated = run_pass(program, InsertHadamard(sites=sites))
        plans = {site: _explained(rotated.plan[site], found) for site, found in errors.items()}
        return rotated.evolve(plan=rotated.plan.with_sites(plans))

    def cost(self, program: Program, work: Work) -> float:
        """One trajectory of every image, and every candidate where it is measured."""
        calls = work.sampler.num_inference_steps + self.timesteps * len(self.candidates)
        return float(self.samples * work.halves() * calls)

    def _choice(self, program: Program, plan: SitePlan, errors: dict[Candidate, float]) -> Candidate:
        """The cheapest candidate that no dearer one beats by its margin."""
        digits = _digits(program, plan, errors, self._largest_code(plan.activation_bits or 8))
        best, *others = sorted(errors, key=lambda one: (digits[one], one[1]))
        for other in others:
            margin = self.second_digit if digits[other] > digits[best] else self.tie
            if errors[other] < errors[best] * (1 - margin):
                best = other
        return best

    def _largest_code(self, bits: int) -> int:
        """The largest |code| that an activation may have: a zero point may lie at either end."""
        return activation_range(bits)[1] if _symmetric(self.activation, bits) else asymmetric_top(bits)


def _symmetric(activation: Range, bits: int) -> bool:
    """What insert_qdq makes of a range that was asked for."""
    return activation == "symmetric" or bits > HIGHEST_ASYMMETRIC_BITS


def free_sites(program: Program) -> tuple[SitePlan, ...]:
    """The sites whose rotation neither the recipe's rules nor a plan's decide."""
    said = ((plan, deciding(program.plan.rules, plan.site, "rotation")) for plan in program.plan.quantised)
    return tuple(
        plan
        for plan, rule in said
        if not plan.reason.startswith("unrotated") and (rule is None or rule.kind_and_order is None)
    )


def _explained(plan: SitePlan, errors: dict[Candidate, float]) -> SitePlan:
    """With the errors in the reason, the best first."""
    ranked = sorted(errors, key=errors.__getitem__)
    text = ", ".join(f"{_name(*one)} {100 * errors[one] ** 0.5:.2g} %" for one in ranked)
    return replace(plan, reason=f"{'rotation' if plan.block else 'unrotated'} by output error: {text}")


def _name(kind: str, order: int) -> str:
    return f"{kind} {order}" if order else kind


def _digits(
    program: Program, plan: SitePlan, candidates: Iterable[Candidate], largest_code: int
) -> dict[Candidate, int]:
    """How many int8 products the weight codes need, rotated by each candidate: 1 or 2."""
    layer = next(node for site, node in program.sites() if site == plan.site)
    weight = program.state[str(layer_inputs(layer)[1].target)]
    low, high = weight_range(plan.weight_bits or 8)
    scale = mse_weight_scale(weight, low, high, _WEIGHT_CANDIDATES)
    codes, limit = torch.ops.hqc.quantize(weight, scale, low, high), digit_limit(largest_code)

    def largest(kind: str, order: int) -> int:
        flag = Rotation(order, kind == "regular").flag
        rotated = torch.ops.hqc.rotate_codes(codes, order, *flag) if order else codes
        return int(rotated.to(torch.int32).abs().max())

    return {one: 1 if largest(*one) <= limit else 2 for one in candidates}


class _Watcher(WatchedRun):
    """Measures every candidate at every site that may be rotated, of a float program."""

    def __init__(self, program: Program, candidates: tuple[Candidate, ...], activation: Range) -> None:
        super().__init__(program)
        self._candidates, self._activation, self.measuring = candidates, activation, False
        self._sums: dict[str, dict[Candidate, float]] = {}
        self._energies: dict[str, float] = {}
        self._plans = {plan.site: plan for plan in free_sites(program)}

    @property
    def errors(self) -> dict[str, dict[Candidate, float]]:
        """By site and candidate the relative squared error of the layer's output."""
        return {
            site: {one: found / max(self._energies[site], 1e-30) for one, found in sums.items()}
            for site, sums in self._sums.items()
        }

    def see(self, node: fx.Node, value: Any) -> None:
        site = node.meta.get("site", "") if node.meta.get("role") == "layer" else ""
        if self.measuring and site in self._plans:
            self._measure(node, site, *(self.env[one] for one in layer_inputs(node)[:2]))

    def _measure(self, layer: fx.Node, site: str, x: Tensor, weight: Tensor) -> None:
        plan, axis = self._plans[site], channel_axis(layer)
        geometry = layer.args[3:]
        energy = float(layer.target(x, weight, None, *geometry).square().sum())  # type: ignore[operator]
        if not math.isfinite(energy):
            raise self.not_finite(f"choosing rotations at {site}", self.timestep)
        self._energies[site] = self._energies.get(site, 0.0) + energy
        sums = self._sums.setdefault(site, {})
        for kind, order in (_NONE, *self._candidates):
            if order and plan.in_channels % order:
                continue
            quantised = quantised_activation(
                _rotated(x, kind, order, axis), plan.activation_bits or 8, self._activation
            )
            difference = _rotated(quantised, kind, order, axis) - x
            found = float(layer.target(difference, weight, None, *geometry).square().sum())  # type: ignore[operator]
            sums[kind, order] = sums.get((kind, order), 0.0) + found


def _rotated(x: Tensor, kind: str, order: int, axis: int) -> Tensor:
    """Ĥ·x, its own inverse; x itself without an order."""
    if not order:
        return x
    return torch.ops.hqc.hadamard(x, order, axis, *Rotation(order, kind == "regular").flag)  # type: ignore[no-any-return]


def quantised_activation(x: Tensor, bits: int, activation: Range) -> Tensor:
    """x̂ with one range, as calibration would choose it."""
    symmetric = _symmetric(activation, bits)
    search = activation_search(bits, symmetric, _SCALE_CANDIDATES)
    least, largest = (float(bound) for bound in x.aminmax())
    search.add(some_values(x), least, largest)
    low, high = activation_range(bits) if symmetric else (-int(search.zero), asymmetric_top(bits) - int(search.zero))
    return torch.ops.hqc.fake_quantize(x, torch.full((len(x),), search.scale), low, high)  # type: ignore[no-any-return]
