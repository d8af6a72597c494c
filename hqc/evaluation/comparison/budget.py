"""Equal budgets: what a recipe costs in denoiser evaluations, and the same recipe with other iterations.

One evaluation is the denoiser run on one sample, a backward pass two. Recipes that train (`qat`) are scaled to one
budget, those that do not (`ptq`) only where that is asked for; by iterations alone, never by batches or rates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from hqc.errors import PlanError
from hqc.program import Program
from hqc.recipes import RECIPES, Recipe
from hqc.recipes.run import Request, is_procedure, planned
from hqc.sampling import Task, Work
from hqc.site_rules import SiteRule

__all__ = ["Budgets", "Scaled", "default_budget", "iterates", "scaled"]

_HALVINGS = 40
"""Of an interval of factors: recipes have fewer than a million updates."""


@dataclass(frozen=True)
class Budgets:
    """Evaluations that recipes of each kind are scaled to; None scales none.

    is_default: nobody asked for that of qat. own: every recipe has the iterations of its own, none is scaled.
    """

    qat: float | None = None
    ptq: float | None = None
    is_default: bool = False
    own: bool = False

    def of(self, kind: str) -> float | None:
        """Of one kind."""
        return self.qat if kind == "qat" else self.ptq


@dataclass(frozen=True)
class Scaled:
    """A recipe as it is run. factor: its iterations over its own; None where it has none."""

    recipe: Recipe
    evaluations: float
    factor: float | None


def iterates(recipe: Recipe) -> bool:
    """Whether it has iterations that can be scaled."""
    return any(_is_iterative(step) for step in recipe.steps)


def default_budget(program: Program, task: Task, bits: str) -> float:
    """What `hq-dm` costs on this program."""
    recipe = RECIPES["hq-dm"]
    return _Costs(program, recipe, task, bits).of(recipe)


def scaled(
    program: Program, recipe: Recipe, task: Task, bits: str, budget: float | None, rules: Sequence[SiteRule] = ()
) -> Scaled:
    """The recipe with the iterations whose cost is nearest to the budget; as it is without one, or without iterations.

    rules: of a plan.

    Raises:
        PlanError: if the budget does not pay for what comes before the first iteration, and one.
    """
    costs = _Costs(program, recipe, task, bits, rules)
    if budget is None or not iterates(recipe):
        return Scaled(recipe, costs.of(recipe), 1.0 if iterates(recipe) else None)
    least = costs.with_updates(costs.times(0.0))
    if budget < least:
        raise PlanError(
            f"budget {budget:,.0f}",
            f"recipe {recipe.name!r} needs {least:,.0f} evaluations with one iteration a step",
            f"Give --budget-{recipe.kind} more.",
        )
    updates = costs.nearest(budget)
    return Scaled(costs.recipe(updates), costs.with_updates(updates), sum(updates) / sum(costs.own))


class _Costs:
    """What a recipe costs on a program, and with other iterations: its steps have parts that those do not change."""

    def __init__(self, program: Program, recipe: Recipe, task: Task, bits: str, rules: Sequence[SiteRule] = ()) -> None:
        self._recipe, self._work = recipe, Work(program, task, recipe.sampler)
        timesteps = self._work.sampled.timesteps(recipe.sampler.num_inference_steps)
        request = Request(bits, timesteps=timesteps, rules=tuple(rules))
        self._ready = planned(program, recipe, request, calibrated=False)
        self.own = tuple(_own_updates(step, self._work) for step in recipe.steps)
        self.with_updates = cache(self._with_updates)

    def of(self, recipe: Recipe) -> float:
        """Evaluations of the recipe with some iterations."""
        return sum(step.cost(self._ready, self._work) for step in recipe.steps if is_procedure(step))

    def _with_updates(self, updates: tuple[int, ...]) -> float:
        return self.of(self.recipe(updates))

    def recipe(self, updates: tuple[int, ...]) -> Recipe:
        """With that many updates of each step, 0 of one that has none."""
        given: Iterable[tuple[Any, int, int]] = zip(self._recipe.steps, updates, self.own, strict=True)
        steps = (step if count == own else replace(step, updates=count) for step, count, own in given)
        return replace(self._recipe, steps=tuple(steps))

    def times(self, factor: float) -> tuple[int, ...]:
        """That many times the updates of each step, one at least of one that has any."""
        return tuple(own and max(1, round(own * factor)) for own in self.own)

    def nearest(self, budget: float) -> tuple[int, ...]:
        """The updates whose cost is nearest to the budget, which pays for one of each."""
        low, high = 0.0, 1.0
        while self.with_updates(self.times(high)) < budget:
            low, high = high, 2 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.with_updates(self.times(middle)) <= budget else (low, middle)
        below, above = self.times(low), self.times(high)
        return below if budget - self.with_updates(below) <= self.with_updates(above) - budget else above


def _is_iterative(step: Any) -> bool:
    return hasattr(step, "total") and hasattr(step, "updates")


def _own_updates(step: Any, work: Work) -> int:
    """Of a step as the recipe has it; 0 of one that does not iterate."""
    return int(step.total(work)) if _is_iterative(step) else 0
