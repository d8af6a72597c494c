"""The choice within a budget against every choice that there is, and at the edge of what floating point can tell."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.errors import PlanError
from hqc.search.allocate import allocate

relaxed = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int]:
    """Costs and losses of up to five sites with up to four candidates, and a budget that some choice is within."""
    sites, candidates = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    cost = st.integers(0, draw(st.sampled_from([5, 1000, 10**10])))
    costs = [[draw(cost) for _ in range(candidates)] for _ in range(sites)]
    losses = [[draw(st.floats(0, 10)) for _ in range(candidates)] for _ in range(sites)]
    smallest, largest = (sum(ends(row) for row in costs) for ends in (min, max))
    return costs, losses, draw(st.integers(smallest, largest))


@relaxed
@given(tables())
def test_no_choice_within_the_budget_is_better(table: tuple[list[list[int]], list[list[float]], int]) -> None:
    costs, losses, budget = table

    def total(rows: list[list[int]] | list[list[float]], chosen: tuple[int, ...]) -> float:
        return sum(row[one] for row, one in zip(rows, chosen, strict=True))

    chosen = allocate(costs, losses, budget)
    every = product(range(len(costs[0])), repeat=len(costs))
    best = min(total(losses, one) for one in every if total(costs, one) <= budget)
    assert total(costs, chosen) <= budget
    assert total(losses, chosen) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_a_budget_is_kept_to_the_last_bit() -> None:
    """One bit of ten thousand million is far below the solver's tolerance."""
    costs, losses = [[5 * 10**9, 5 * 10**9 + 1]] * 2, [[1.0, 0.0], [1.0, 0.5]]
    assert allocate(costs, losses, 10**10 + 2) == (1, 1)
    assert allocate(costs, losses, 10**10 + 1) == (1, 0)
    assert allocate(costs, losses, 10**10) == (0, 0)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for budget in range(20, 200, 20):
        allocate([[2, 3, 4, 6, 8]] * 40, [[1 / (1 + n + b) ** 2 for b in range(5)] for n in range(40)], budget + 60)
    assert capfd.readouterr().out == ""


def test_no_sites_and_no_plan() -> None:
    assert allocate([], [], 0) == ()
    with pytest.raises(PlanError, match="no plan is within the budget"):
        allocate([[2, 3]], [[1.0, 0.0]], 1)
