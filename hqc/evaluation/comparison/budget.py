"""Equal budgets: what a recipe costs in denoiser evaluations, and the same recipe with other iterations.

One evaluation is the denoiser run on one sample, a backward pass two. Recipes that train (`qat`) are scaled to one
budget, those that do not (`ptq`) only where that is asked for; by iterations alone, never by batches or rates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hqc.errors import PlanError
from hqc.program import Program
from hqc.recipes import RECIPES, Recipe
from hqc.recipes.run import Request, is_procedure, planned
from hqc.sampling import Task, Work
from hqc.site_rules import SiteRule

__all__ = ["Budgets", "Scaled", "default_budget", "iterates", "scaled"]


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
    return sum(_costs(program, RECIPES["hq-dm"], task, bits))


def scaled(
    program: Program, recipe: Recipe, task: Task, bits: str, budget: float | None, rules: Sequence[SiteRule] = ()
) -> Scaled:
    """The recipe with as many iterations as the budget has room for; as it is without one, or without iterations.

    rules: of a plan.

    Raises:
        PlanError: if the budget does not pay for what comes before the first iteration.
    """
    fixed, own = _costs(program, recipe, task, bits, rules)
    if budget is None or not iterates(recipe):
        return Scaled(recipe, fixed + own, 1.0 if iterates(recipe) else None)
    if budget <= fixed:
        raise PlanError(
            f"budget {budget:,.0f}",
            f"recipe {recipe.name!r} needs {fixed:,.0f} evaluations before its first iteration",
            f"Give --budget-{recipe.kind} more.",
        )
    work = Work(program, task, recipe.sampler)
    changed = replace(recipe, steps=tuple(_scaled(step, work, (budget - fixed) / own) for step in recipe.steps))
    cost = sum(_costs(program, changed, task, bits, rules))
    return Scaled(changed, cost, (cost - fixed) / own)


def _costs(
    program: Program, recipe: Recipe, task: Task, bits: str, rules: Sequence[SiteRule] = ()
) -> tuple[float, float]:
    """Evaluations of the steps without iterations, and of those with."""
    work = Work(program, task, recipe.sampler)
    timesteps = work.sampled.timesteps(recipe.sampler.num_inference_steps)
    request = Request(bits, timesteps=timesteps, rules=tuple(rules))
    ready = planned(program, recipe, request, calibrated=False)
    costs: Mapping[bool, list[float]] = {False: [], True: []}
    for step in recipe.steps:
        if is_procedure(step):
            costs[_is_iterative(step)].append(step.cost(ready, work))
    return sum(costs[False]), sum(costs[True])


def _is_iterative(step: Any) -> bool:
    return hasattr(step, "total") and hasattr(step, "updates")


def _scaled(step: Any, work: Work, factor: float) -> Any:
    """A step with that many times its updates, one at least."""
    if not _is_iterative(step):
        return step
    own = step.total(work)
    updates = max(1, round(own * factor))
    return step if updates == own else replace(step, updates=updates)
