"""`search`: costs, sensitivities, the choice, and what it is worth, predicted and measured, beside equal bits."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hqc.bits import parse_bits
from hqc.errors import PassError, PlanError
from hqc.plan import SitePlan
from hqc.program import Program, Stage
from hqc.recipes import Recipe
from hqc.recipes.plan_file import PlanFile
from hqc.recipes.run import Request, planned
from hqc.sampling import Task
from hqc.sampling.task import called_once
from hqc.search.allocate import allocate
from hqc.search.budget import Budget, Count, Unit
from hqc.search.costs import CostTable, cost_table, limit_of
from hqc.search.journal import Journal
from hqc.search.measure import Measure, Progress
from hqc.site_rules import SiteRule

__all__ = [
    "CANDIDATES",
    "Asked",
    "Choice",
    "Found",
    "Judged",
    "measured_errors",
    "parse_candidates",
    "search",
    "uniform_candidate",
    "widths_of",
]

CANDIDATES: Mapping[Unit, str] = {
    "bytes": "w2a8,w3a8,w4a8,w5a8,w6a8,w8a8",
    "BOPs": "w2a4,w3a4,w4a4,w4a6,w6a6,w4a8,w6a8,w8a8",
}
"""What is tried unless it is asked for: activations take no bytes, so they stay as wide as they go."""
FILE_CANDIDATES = "w4a8,w8a8"
"""The same for bytes of files: fewer bits than these take no less there."""

Phase = Callable[[str, int], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Asked:
    """What a search is asked for besides program, recipe and task.

    candidates: `wNaM` each; empty: `CANDIDATES`. count: what a budget of bytes counts. samples: images of the float
    trajectory at each of so many `timesteps`. seed: of their noise and conditions.
    """

    budget: Budget
    candidates: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = ()
    samples: int = 4
    timesteps: int = 4
    seed: int = 2024
    count: Count = "files"

    @property
    def tried(self) -> tuple[str, ...]:
        """The candidates, or those that a budget of its kind has."""
        usual = FILE_CANDIDATES if self.budget.unit == "bytes" and self.count == "files" else None
        return self.candidates or parse_candidates(usual or CANDIDATES[self.budget.unit])


@dataclass(frozen=True)
class Choice:
    """One site: its bits, what it takes, and the error of the output when it alone is quantised."""

    site: str
    bits: str
    cost: float
    error: float


@dataclass(frozen=True)
class Judged:
    """A plan: what it takes, and the relative error of the denoiser's output with all of it."""

    bits: str
    cost: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Found:
    """The plan, site by site, beside the largest one of equal bits everywhere that is within the budget too.

    plan: of both the one that errs less as measured, which is `written`; found and choices are of the one that was
    searched.
    """

    plan: PlanFile
    unit: Unit
    budget: float
    ends: tuple[float, float]
    found: Judged
    uniform: Judged
    choices: tuple[Choice, ...]
    fixed: tuple[Choice, ...]

    @property
    def written(self) -> Judged:
        """What the plan is: equal bits where errors of single sites do not add up and these err less."""
        return _better(self.found, self.uniform)

    @property
    def widths(self) -> dict[str, int]:
        """How many sites have which bits."""
        return dict(sorted(Counter(choice.bits for choice in self.choices).items()))

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        data = {name: value for name, value in asdict(self).items() if name != "plan"}
        return {**data, "widths": self.widths, "written": self.written.bits}


def parse_candidates(text: str) -> tuple[str, ...]:
    """w4a8,w8a8 -> each once.

    Raises:
        PlanError: for bits that are none, or fewer than two.
    """
    found = tuple(dict.fromkeys(str(parse_bits(part)) for part in text.split(",")))
    if len(found) < 2:
        raise PlanError(f"--candidates {text}", "leaves nothing to choose", "Give two or more, as in w4a8,w8a8.")
    return found


def search(
    program: Program,
    recipe: Recipe,
    task: Task,
    asked: Asked,
    *,
    folder: Path | None = None,
    phase: Phase = lambda name, total: nullcontext(lambda done, note: None),
) -> Found:
    """The plan within a budget whose predicted error is least, and what it measures; equal bits if these err less.

    Sites whose bits the recipe's rules fix keep them. What trains in the recipe is left out while measuring.
    folder: keeps every measurement, so that the same search goes on there. phase(name, total) yields advance(done,
    note).

    Raises:
        PlanError: for a budget that no plan, or every one, is within. PassError: for a program that is not captured.
        MemoryShortError: before anything runs. TrainingError: where calibration meets NaN.
    """
    if program.stage != Stage.CAPTURED:
        raise PassError("search", f"takes a program that is captured; this one is {program.stage}", "Give hqc trace's.")
    if recipe.step("insert_qdq").activation == "float":
        said = f"recipe {recipe.name!r} leaves activations float: no product has widths to choose"
        raise PlanError("search", said, "Take another recipe, as rtn.")
    unit, candidates = asked.budget.unit, asked.tried
    own = recipe.untrained()
    task = called_once(task, own.sampler.timestep)
    grid = task.timesteps(own.sampler.num_inference_steps)
    requests = {bits: Request(bits, asked.keep_float, grid) for bits in candidates}
    programs = {bits: planned(program, own, request, calibrated=False) for bits, request in requests.items()}
    table = cost_table(programs, unit, asked.count)
    limit = limit_of(asked.budget, table)
    measure = Measure(program, own, task, asked.keep_float, asked.samples, asked.timesteps, asked.seed, Journal(folder))
    measure.check()
    fixed = {
        site.site: widths_of(site) for site in programs[candidates[0]].plan.quantised if site.site not in table.sites
    }
    errors, errors_of_fixed = measured_errors(measure, table, tuple(fixed), phase)
    constant = sum(error**2 for error in errors_of_fixed.values())
    best = uniform_candidate(table, errors, limit)
    table = table.on(best)
    chosen = allocate(list(table.sites.values()), [[error**2 for error in row] for row in errors], limit - table.fixed)

    def predicted(numbers: Sequence[int]) -> float:
        return math.sqrt(_squares(errors, numbers) + constant)

    def judged(name: str, numbers: Sequence[int], rules: Sequence[SiteRule]) -> Judged:
        measured = measure.plan(candidates[best], rules)
        return Judged(name, table.amount(table.total(numbers)), predicted(numbers), measured)

    choices = tuple(
        Choice(site, candidates[one], table.amount(table.sites[site][one]), errors[place][one])
        for place, (site, one) in enumerate(zip(table.sites, chosen, strict=True))
    )
    rules = tuple(SiteRule(choice.site, choice.bits) for choice in choices)
    with phase("measuring the plan", 2) as advance:
        found = judged("mixed", chosen, rules)
        advance(1, candidates[best])
        uniform = judged(candidates[best], [best] * len(chosen), ())
        advance(2, "")
    kept = chosen if _better(found, uniform) is found else [best] * len(chosen)
    whole = predicted(kept)
    explained = [
        SiteRule(site, candidates[one], why=f"error {row[one]:.2e} of {whole:.2e}")
        for site, row, one in zip(table.sites, errors, kept, strict=True)
    ]
    return Found(
        PlanFile(tuple(explained), candidates[best]),
        unit,
        table.amount(limit),
        (table.amount(table.ends[0]), table.amount(table.ends[1])),
        found,
        uniform,
        choices,
        tuple(Choice(site, bits, 0.0, errors_of_fixed[site]) for site, bits in fixed.items()),
    )


def _better(found: Judged, uniform: Judged) -> Judged:
    return found if found.measured <= uniform.measured else uniform


def widths_of(site: SitePlan) -> str:
    return f"w{site.weight_bits}a{site.activation_bits}"


def measured_errors(
    measure: Measure, table: CostTable, fixed: Sequence[str], phase: Phase
) -> tuple[list[list[float]], dict[str, float]]:
    """The error of every free site at every candidate, a row a site, and by name those of the fixed ones."""
    free, columns = list(table.sites), list[dict[str, float]]()
    with phase("sensitivity", len(free) * len(table.candidates) + len(fixed)) as advance:
        done = 0
        for bits in table.candidates:
            wanted = free if columns else [*free, *fixed]
            columns.append(measure.sites(bits, wanted, behind(done, advance)))
            done += len(wanted)
    return [[column[site] for column in columns] for site in free], {site: columns[0][site] for site in fixed}


def behind(done: int, advance: Progress) -> Progress:
    """The progress of a part, after so much."""
    return lambda known, note: advance(done + known, note)


def uniform_candidate(table: CostTable, errors: Sequence[Sequence[float]], limit: int) -> int:
    """The candidate for every site: the largest within the limit, of equal ones that with the least error."""
    count, numbers = len(table.sites), range(len(table.candidates))
    costs = [table.uniform(one) for one in numbers]
    fitting = [one for one in numbers if costs[one] <= limit] or [costs.index(min(costs))]
    return max(fitting, key=lambda one: (costs[one], -_squares(errors, [one] * count)))


def _squares(errors: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return sum(row[one] ** 2 for row, one in zip(errors, chosen, strict=True))
