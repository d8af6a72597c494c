"""Bits and ranks together: predicted by measurements and one short training, chosen by NSGA-II, trained, refined.

    1. error of every site alone at every width (as `hqc search`), and what a short training takes off it
    2. NSGA-II over bits and ranks of all sites: predicted loss against cost, repaired to the budget
    3. short trainings of plans of its front, then of the neighbours of the best ones that a Gaussian process on
       log(measured / predicted) expects to better the best

Own choices: errors are of the denoiser's output, not of a language model's answers; predictions are additive instead of
a network's; every training is a real one (the published code adds noise to a proxy); the process models how far the
prediction is off, and the least measured error within the budget is the result.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from hqc.errors import OptionError, PassError, PlanError, RuntimeMissingError
from hqc.passes.rewriting import layer_inputs
from hqc.program import Program, Stage
from hqc.recipes import Recipe
from hqc.recipes.plan_file import PlanFile
from hqc.recipes.run import planned
from hqc.sampling import Task
from hqc.search.allocate import allocate
from hqc.search.budget import Budget
from hqc.search.costs import CostTable, cost_table, limit_of
from hqc.search.joint.front import front, undominated
from hqc.search.joint.gains import left_of
from hqc.search.joint.gaussian import GaussianProcess, expected_improvement
from hqc.search.joint.space import LORA_BITS, Plan, Space
from hqc.search.journal import Journal
from hqc.search.measure import Measure
from hqc.search.run import CANDIDATES, Phase, measured_errors, parse_candidates, uniform_candidate
from hqc.site_rules import SiteRule

__all__ = ["Adapted", "AskedJointly", "Trained", "adapt", "require_optuna"]

_FIRST = 4
"""Plans of the front that are trained before the process says which."""
_LEAST_IMPROVEMENT = 1e-4
"""Of the logarithm of the error: less is not worth a training."""


@dataclass(frozen=True)
class AskedJointly:
    """What is asked for besides program, recipe and task.

    ranks: of LoRAs, as far as a layer has them. trials, population: of NSGA-II. trainings: at most so many plans are
    trained, besides the first, which measures gains. The rest as in `hqc.search.Asked`.
    """

    budget: Budget
    candidates: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (8, 16, 32)
    keep_float: tuple[str, ...] = ()
    samples: int = 4
    timesteps: int = 4
    seed: int = 2024
    trials: int = 480
    population: int = 40
    trainings: int = 12


@dataclass(frozen=True)
class Trained:
    """A plan that was trained: bytes with its LoRAs, the error predicted and measured."""

    cost: float
    predicted: float
    measured: float
    choices: Mapping[str, tuple[str, int]]


@dataclass(frozen=True)
class Adapted:
    """The plan whose measured error is least, all that were trained in their order, and the predicted front."""

    plan: PlanFile
    budget: float
    ends: tuple[float, float]
    best: Trained
    trained: tuple[Trained, ...]
    front: tuple[tuple[float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {name: value for name, value in asdict(self).items() if name != "plan"}


def require_optuna() -> None:
    """Refuses to begin without it.

    Raises:
        RuntimeMissingError: naming the extra that brings it.
    """
    if find_spec("optuna") is None:
        raise RuntimeMissingError(
            "hqc qr-adaptor", "needs optuna, which is not installed", "pip install 'hqc[search]'."
        )


def adapt(
    program: Program,
    recipe: Recipe,
    task: Task,
    asked: AskedJointly,
    *,
    folder: Path | None = None,
    phase: Phase = lambda name, total: nullcontext(lambda done, note: None),
) -> Adapted:
    """The plan of bits and ranks within the budget that errs least after the recipe's training, of those trained.

    recipe: trains LoRAs, as briefly as a comparison needs. folder: keeps every measurement and training.

    Raises:
        PlanError: for a recipe without LoRA, or a budget that no plan is within. OptionError: for a budget of bit
        operations. RuntimeMissingError: without optuna. Others: see `hqc.search.search`.
    """
    require_optuna()
    if program.stage != Stage.CAPTURED:
        raise PassError("search", f"takes a program that is captured; this one is {program.stage}", "Give hqc trace's.")
    if recipe.step("attach_lora") is None or recipe.kind != "qat":
        raise PlanError(f"recipe {recipe.name!r}", "trains no LoRA, whose ranks are searched", "Use --recipe hq-dm.")
    if asked.budget.unit != "bytes":
        raise OptionError(
            f"--budget {asked.budget.text}", "is of bit operations, which ranks do not take", "Give bytes."
        )
    journal, own = Journal(folder), recipe.untrained()
    options = (asked.keep_float, asked.samples, asked.timesteps, asked.seed, journal)
    measure, trained = Measure(program, own, task, *options), Measure(program, recipe, task, *options)
    table, fixed = _table(program, own, measure, asked)
    layers = {site: _sides(layer) for site, layer in fixed.sites()}
    ranks = {site: _fitting(asked.ranks, min(layers[site])) for site in table.sites}
    rank_costs = [[LORA_BITS * rank * sum(layers[site]) for rank in ranks[site]] for site in table.sites]
    more = (sum(one[0] for one in rank_costs), sum(one[-1] for one in rank_costs))
    limit = limit_of(asked.budget, table, more)
    trained.check()
    others = [site.site for site in fixed.plan.quantised if site.site not in table.sites]
    errors, of_fixed = measured_errors(measure, table, others, phase)
    middle = uniform_candidate(table, errors, limit)
    table = table.on(middle)
    with phase("gains of training", len(ranks)) as advance:
        before = {site: row[middle] for site, row in zip(table.sites, errors, strict=True)}
        left = left_of(trained, table.candidates[middle], ranks, before, advance)
    space = Space(
        tuple(table.sites),
        table.candidates,
        tuple(table.sites.values()),
        [[error**2 for error in row] for row in errors],
        tuple(ranks.values()),
        rank_costs,
        left,
        table.fixed,
        sum(error**2 for error in of_fixed.values()),
        limit,
    )
    runs = _Runs(space, trained, table.candidates[middle], asked.trainings, phase)
    found = front(space, asked.trials, asked.population, asked.seed, _first(space))
    runs.train_all(found)
    best = min(runs.measured, key=lambda plan: runs.measured[plan])
    ends = (table.amount(table.ends[0] + more[0]), table.amount(table.ends[1] + more[1]))
    why = f"of {runs.measured[best]:.2e} after training"
    rules = tuple(replace(rule, why=why if not i else "") for i, rule in enumerate(runs.rules(best)))
    return Adapted(
        PlanFile(rules, table.candidates[middle]),
        table.amount(limit),
        ends,
        runs.said(best),
        tuple(runs.said(plan) for plan in runs.measured),
        tuple((table.amount(space.cost(plan)), math.sqrt(space.loss(plan))) for plan in found),
    )


def _table(program: Program, own: Recipe, measure: Measure, asked: AskedJointly) -> tuple[CostTable, Program]:
    """What bits take, candidates ascending in cost, and the program planned at the first."""
    wanted = asked.candidates or parse_candidates(CANDIDATES["bytes"])
    programs = {bits: planned(program, own, measure.request(bits), calibrated=False) for bits in wanted}
    table = cost_table(programs, "bytes")
    order = sorted(wanted, key=lambda bits: table.uniform(wanted.index(bits)))
    return cost_table({bits: programs[bits] for bits in order}, "bytes"), programs[order[0]]


def _sides(layer: fx.Node) -> tuple[int, int]:
    """Rows and columns of a layer's weight as a matrix."""
    rows, *rest = (int(size) for size in layer_inputs(layer)[1].meta["shape"])
    return rows, math.prod(rest)


def _fitting(ranks: Sequence[int], largest: int) -> tuple[int, ...]:
    """The ranks as far as a layer has them, ascending."""
    return tuple(sorted({min(rank, largest) for rank in ranks}))


def _first(space: Space) -> tuple[Plan, ...]:
    """Plans to begin with: the exact choice of bits beside the smallest ranks, and the smallest plan."""
    small = sum(own[0] for own in space.rank_costs)
    bits = allocate(space.costs, space.losses, space.limit - space.fixed - small)
    return tuple((one, 0) for one in bits), space.smallest


@dataclass
class _Runs:
    """Trainings, in their order."""

    space: Space
    measure: Measure
    bits: str
    most: int
    phase: Phase

    def __post_init__(self) -> None:
        self.measured: dict[Plan, float] = {}

    def train_all(self, found: Sequence[Plan]) -> None:
        """Plans of the front, evenly spread from the best; then what is expected to better the best."""
        first = min(_FIRST, self.most, len(found))
        spread = [found[round(i * (len(found) - 1) / max(1, first - 1))] for i in range(first)]
        with self.phase("trainings", self.most) as advance:
            for plan in dict.fromkeys(spread):
                self._train(plan)
                advance(len(self.measured), "front")
            while len(self.measured) < self.most and (following := self._next(found)) is not None:
                self._train(following)
                advance(len(self.measured), "neighbours")

    def _train(self, plan: Plan) -> None:
        self.measured[plan] = self.measure.plan(self.bits, self.rules(plan))

    def _next(self, found: Sequence[Plan]) -> Plan | None:
        """The plan of the largest expected improvement; None if none is expected to better anything."""
        near = (other for plan in undominated(self.space, self.measured) for other in self.space.neighbours(plan))
        tried = [plan for plan in dict.fromkeys((*found, *near)) if plan not in self.measured]
        if not tried:
            return None
        rest = [math.log(error / self._predicted(plan)) for plan, error in self.measured.items()]
        process = GaussianProcess([self.space.numbers(plan) for plan in self.measured], rest)
        mean, deviation = process.predict([self.space.numbers(plan) for plan in tried])
        expected = mean + np.log([self._predicted(plan) for plan in tried])
        best = math.log(min(self.measured.values()))
        gains = expected_improvement(expected, deviation, best)
        place = int(gains.argmax())
        return tried[place] if gains[place] >= _LEAST_IMPROVEMENT else None

    def _predicted(self, plan: Plan) -> float:
        return math.sqrt(max(self.space.loss(plan), 1e-30))

    def rules(self, plan: Plan) -> tuple[SiteRule, ...]:
        """The plan as rules."""
        return tuple(SiteRule(site, bits, lora_rank=rank) for site, (bits, rank) in self.space.choices(plan).items())

    def said(self, plan: Plan) -> Trained:
        """For reports."""
        return Trained(self.space.cost(plan) / 8, self._predicted(plan), self.measured[plan], self.space.choices(plan))
