"""GANQ: both steps against plain numpy, the best pair kept, whole tables, the step inside a program, refusals."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hqc.calibration import lookup
from hqc.calibration.lookup import FitLookup, _choose_codes, _solve_table, fit_bytes, fit_lookup, output_error
from hqc.calibration.site_rows import SiteRows
from hqc.errors import MemoryShortError, TrainingError
from hqc.program import Program
from hqc.recipes import find_recipe
from hqc.recipes.run import Request, begin, planned
from hqc.sampling import Sampler, Work, synthetic_task


def _case(rows: int = 5, columns: int = 130, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and XᵀX of correlated inputs; more columns than one block."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ (mixing + 0.5 * torch.eye(columns))
    return weight, x.T @ x


def _codes_by_hand(weight: np.ndarray, factor: np.ndarray, table: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """The S-step as it is written, one weight at a time."""
    codes = np.zeros(weight.shape, int)
    for i, row in enumerate(weight):
        residual = np.zeros(len(row))
        for j in range(len(row) - 1, -1, -1):
            wanted = row[j] + sum(residual[u] * factor[u, j] for u in range(j + 1, len(row))) / factor[j, j]
            codes[i, j] = int(np.argmin(np.abs(wanted - table[i])))
            residual[j] = row[j] - table[i, codes[i, j]]
    return codes


def test_codes_make_up_for_those_behind_them() -> None:
    weight, gram = _case()
    factor = torch.linalg.cholesky(gram.double() + torch.eye(len(gram), dtype=torch.float64))
    table = torch.linspace(-2, 2, 8, dtype=torch.float64).repeat(5, 1)
    found = _choose_codes(weight.double(), factor, table)
    assert np.array_equal(found.numpy(), _codes_by_hand(weight.double().numpy(), factor.numpy(), table.numpy()))
    nearest = (weight.double().unsqueeze(-1) - table.unsqueeze(1)).abs().argmin(-1)
    errors = [output_error(weight - table.gather(1, codes), factor @ factor.T) for codes in (found, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_tables_are_the_least_squares_ones() -> None:
    """Against lstsq on ‖(W_i - T_i·S_i)·L‖ itself; an entry that nothing uses stays."""
    weight, gram = _case(3, 40)
    hessian = gram.double() + torch.eye(40, dtype=torch.float64)
    factor = torch.linalg.cholesky(hessian).numpy()
    codes = torch.randint(0, 7, (3, 40), generator=torch.Generator().manual_seed(1))
    before = torch.full((3, 8), 9.0, dtype=torch.float64)
    found = _solve_table(weight.double(), hessian, codes, before)
    for row in range(3):
        chosen = np.eye(8)[codes[row]][:, :7]  # [40, 7]
        wanted = np.linalg.lstsq(factor.T @ chosen, factor.T @ weight[row].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[row, :7].numpy(), wanted, rtol=1e-3, atol=1e-4)  # sums in float32
        assert found[row, 7] == 9.0


def test_more_rounds_are_never_worse() -> None:
    weight, gram = _case()
    errors = [fit_lookup(weight, gram, 3, rounds).error for rounds in (0, 1, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]  # of the uniform grid, rounded to nearest


@pytest.mark.parametrize("grid", [127, 64])
def test_a_whole_table_holds_whole_numbers(grid: int) -> None:
    weight, gram = _case()
    scale = weight.abs().amax(1) / grid
    fit = fit_lookup(weight, gram, 3, 4, scale, grid)
    whole = fit.weight / scale.double().unsqueeze(1)
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-9)
    assert float(whole.abs().max()) <= grid
    assert all(len(row.unique()) <= 8 for row in whole)
    assert fit.error < 1.2 * fit_lookup(weight, gram, 3, 4).error


def test_a_row_of_zeros_and_inputs_that_are_never_there() -> None:
    weight, gram = _case(3, 20)
    weight[1] = 0
    gram[4] = gram[:, 4] = 0
    fit = fit_lookup(weight, gram, 4, 3, torch.ones(3), 127)
    assert not fit.weight[1].any()
    assert bool(fit.weight.isfinite().all())


# ---- the step --------------------------------------------------------------------------------------------------------

STEP = FitLookup(samples=1, timesteps=1, rows=4, rounds=1)


def _begun(program: Program) -> tuple[Program, Work]:
    work = Work(program, synthetic_task(program), Sampler(2, 1.0, 0.0))
    return begin(program, find_recipe("ganq"), Request("w4a8")), work


def test_the_largest_layer_is_asked_for_first(
    captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """H is [K, K] in float64, which rows do not tell."""
    program, work = _begun(captured("two_sites"))
    assert fit_bytes(640, 17_280) > 3 * 8 * 17_280**2
    monkeypatch.setattr(lookup, "require_rows", lambda *args: None)
    STEP.check(program, work)
    monkeypatch.setattr("hqc.memory.available_bytes", lambda: 12_345)
    said = r"fitting the tables of conv, of 288 inputs: needs about [\d.]+ MB of memory and 12\.3 kB are available"
    with pytest.raises(MemoryShortError, match=said + r"\. Leave it out \(--keep-float conv\)"):
        STEP.check(program, work)


@pytest.mark.parametrize("recipe", ["ganq", "ganq-int8"])
def test_inputs_without_finite_squares_are_refused_by_name(
    recipe: str, captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, work = _begun(captured("two_sites"))
    marked = planned(program.evolve(plan=captured("two_sites").plan), find_recipe(recipe), Request("w4a8"))
    sizes = {site: layer.args[1].meta["shape"] for site, layer in marked.sites()}

    def seen(*args: object) -> dict[str, SiteRows]:
        return {
            site: SiteRows(torch.ones(1), [torch.full((4, math.prod(shape[1:])), 1e30)])
            for site, shape in sizes.items()
        }

    monkeypatch.setattr(lookup, "collect_for", seen)
    said = r"fitting tables at conv: XᵀX of what it reads, up to 1e\+30, has NaN or infinity\. Leave it float "
    with pytest.raises(TrainingError, match=said + r"\(--keep-float conv\)"):
        STEP.run(marked, work)
