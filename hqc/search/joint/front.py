"""The plans that no other beats in both cost and predicted loss: NSGA-II by optuna, every one repaired to the limit."""

from collections.abc import Iterable, Sequence
from typing import Any

from hqc.search.joint.space import Plan, Space

__all__ = ["front", "undominated"]


def front(space: Space, trials: int, population: int, seed: int, first: Sequence[Plan] = ()) -> tuple[Plan, ...]:
    """By loss, the least first. first: plans to begin with.

    The same seed gives the same front.
    """
    import optuna
    from optuna.samplers import NSGAIISampler

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=("minimize", "minimize"), sampler=NSGAIISampler(population_size=population, seed=seed)
    )
    for plan in first:
        study.enqueue_trial(dict(_named(space, plan)))
    seen: dict[Plan, None] = {}

    def objective(trial: Any) -> tuple[float, float]:
        bits = [trial.suggest_int(f"{site} bits", 0, len(space.bits) - 1) for site in space.sites]
        ranks = [
            trial.suggest_int(f"{site} rank", 0, len(own) - 1)
            for site, own in zip(space.sites, space.ranks, strict=True)
        ]
        plan = space.repaired(tuple(zip(bits, ranks, strict=True)))
        seen[plan] = None
        return space.loss(plan), float(space.cost(plan))

    study.optimize(objective, n_trials=trials)
    return undominated(space, seen)


def _named(space: Space, plan: Plan) -> Iterable[tuple[str, int]]:
    for site, (bits, rank) in zip(space.sites, plan, strict=True):
        yield f"{site} bits", bits
        yield f"{site} rank", rank


def undominated(space: Space, plans: Iterable[Plan]) -> tuple[Plan, ...]:
    """Those that no other beats in both loss and cost, the least loss first."""
    ordered = sorted(plans, key=lambda plan: (space.loss(plan), space.cost(plan), plan))
    kept: list[Plan] = []
    for plan in ordered:
        if not kept or space.cost(plan) < space.cost(kept[-1]):
            kept.append(plan)
    return tuple(kept)
