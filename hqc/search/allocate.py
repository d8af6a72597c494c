"""The cheapest error within a budget: one candidate for every site, by integer linear programming.

    minimise  Σ_s Σ_c loss[s][c]·x[s][c]    with  Σ_c x[s][c] = 1,  Σ_s Σ_c cost[s][c]·x[s][c] ≤ budget,  x ∈ {0, 1}

Costs are whole numbers, and so is the sum that is held against the budget: the solver computes in floating point,
within a tolerance, so a choice that is too dear after all is excluded by a row of its own and the rest solved again.
"""

from collections.abc import Sequence

import numpy as np

from hqc.errors import PlanError
from hqc.quiet import quiet_output

__all__ = ["allocate"]

_LARGEST_LOSS = 1e6
"""What losses add up to at most as the solver sees them: its tolerances are absolute, about 1e-6."""


def allocate(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> tuple[int, ...]:
    """The candidate of every site: of all choices within the budget the one whose losses add up to least.

    costs, losses: a row a site, a column a candidate.

    Raises:
        PlanError: if no choice is within the budget.
    """
    if not costs:
        return ()
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    sites, candidates = len(costs), len(costs[0])
    price = np.asarray(costs, dtype=np.float64).reshape(-1) / max(1, budget)
    loss = np.asarray(losses, dtype=np.float64)
    scale = _LARGEST_LOSS / max(float(loss.max(1).sum()), 1e-300)
    ones = csr_array(np.kron(np.eye(sites), np.ones(candidates)))
    rows, least, most = (
        [ones, csr_array(price[None])],
        [1.0] * sites + [-np.inf],
        [1.0] * sites + [1.0 if budget else 0.0],
    )
    while True:
        with quiet_output():
            found = milp(
                (loss * scale).reshape(-1),
                integrality=np.ones(sites * candidates),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(vstack(rows), least, most),
                options={"mip_rel_gap": 0.0},
            )
        if found.x is None:
            raise PlanError("search", f"no plan is within the budget ({found.message[:80]})", "Give a larger one.")
        chosen = found.x.reshape(sites, candidates).argmax(1)
        if sum(int(costs[site][one]) for site, one in enumerate(chosen)) <= budget:
            return tuple(int(one) for one in chosen)
        refused = np.zeros((sites, candidates))
        refused[np.arange(sites), chosen] = 1.0
        rows, least, most = [*rows, csr_array(refused.reshape(1, -1))], [*least, -np.inf], [*most, sites - 1.0]
