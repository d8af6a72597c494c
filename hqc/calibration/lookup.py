"""GANQ's alternation: a table of 2ⁿ values for every row of a weight and the codes into it, by the output error.

    min ‖(W - Ŵ)·Xᵀ‖²,  Ŵ_ij = T_i[Q_ij],  H = XᵀX + ridge = L·Lᵀ

    S-step   for j = n-1 … 0:  c = W_ij + Σ_{u>j} r_iu·L_uj/L_jj,  Q_ij = argmin_k |c - T_ik|,  r_ij = W_ij - T_i[Q_ij]
    T-step   T_i = argmin ‖(W_i - T_i·S_i)·L‖²,  S_i one-hot:  (S_i·H·S_iᵀ)·T_i = S_i·H·W_iᵀ

‖r·L‖² is the error: column j of r·L is Σ_{u≥j} r_u·L_uj, so that the S-step, from the last column on, lets every weight
make up for the rounding of those behind it. It is greedy and may raise the error: the best pair of every row is kept.
Source: GANQ (arXiv 2501.12956, equations 15 to 20), whose released code solves the T-step by a pseudo-inverse.

Own choices. Two starts, as the alternation ends near where it began: the uniform grid, and k-means of the row with the
diagonal of H as weights; each row keeps the better end. A ridge of 1 % of the mean of XᵀX's diagonal, as GPTQ has it:
where X has fewer rows than columns XᵀX has no inverse, and the ridge alone says what directions cost that no row has.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hqc.bits import HIGHEST_LOOKUP_BITS, activation_range, parse_bits, weight_range
from hqc.calibration.site_rows import collect_for, require_rows
from hqc.calibration.weights import mse_weight_scale, source_weight
from hqc.errors import PlanError, TrainingError
from hqc.memory import require_memory
from hqc.passes.rewriting import layer_inputs
from hqc.passes.split_digits import digit_limit
from hqc.program import Program, Stage
from hqc.sampling import Work
from hqc.steps import check_options

__all__ = ["FitLookup", "LookupFit", "fit_bytes", "fit_lookup", "output_error"]

_RIDGE = 0.01  # of the mean of the diagonal
_CLUSTERINGS = 20
_COLUMNS_A_BLOCK = 64
_VALUES_A_CALL = 2**22


@dataclass(frozen=True)
class FitLookup:
    """Fills the weights that `insert_qdq(weight="lookup")` marked: values of a table for every row.

    Beside float activations the table holds any 2ⁿ numbers, as GANQ's own. Beside quantised ones they are whole: 2ⁿ
    numbers of an int8 grid with one scale, max|W_o| over 127 or 64 (see `split_digits`), so that the product stays an
    integer one. rounds: of both steps. samples: images of the float trajectory; timesteps: how many of its steps give
    rows, evenly spread; rows: tokens or windows of each. seed: of noise, conditions, rows.
    """

    rounds: Annotated[int, Field(ge=1, le=1000)] = 5
    samples: Annotated[int, Field(ge=1, le=4096)] = 8
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 10
    rows: Annotated[int, Field(ge=1, le=65536)] = 256
    seed: Annotated[int, Field(ge=0)] = 2024

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    samples_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, program: Program, work: Work) -> None:
        """See `require_rows`; and refuses a layer whose fit does not fit.

        Raises:
            MemoryShortError: with the numbers.
        """
        require_rows(self, program, work, "fitting tables")
        shapes = {site: layer_inputs(layer)[1].meta["shape"] for site, layer in program.sites()}
        needed = {site: fit_bytes(shape[0], math.prod(shape[1:])) for site, shape in shapes.items()}
        if needed:
            site = max(needed, key=lambda one: needed[one])
            what = f"fitting the tables of {site}, of {math.prod(shapes[site][1:])} inputs"
            do = f"Leave it out (--keep-float {site}), close other programs, or take a larger machine"
            require_memory(what, program.size_bytes() + needed[site], do)

    def run(self, program: Program, work: Work) -> Program:
        """The program with other weights and scales.

        Raises:
            TrainingError: where the sampler meets NaN, or inputs are too large for their squares. PlanError: if no
            weight has a table.
        """
        layers, state = dict(program.sites()), dict(program.state)
        fitted = [plan for plan in program.plan.sites if plan.weight_lookup]
        wide = bool(program.plan.bits) and parse_bits(program.plan.bits).weight > HIGHEST_LOOKUP_BITS
        if not fitted and (program.plan.quantised or wide):
            found = f"no weight has a table; the plan is {program.plan.bits}"
            do = f'Ask for w2 … w{HIGHEST_LOOKUP_BITS}, as --bits w4a8, and put insert_qdq(weight="lookup") before it.'
            raise PlanError("fit_lookup", found, do)
        inputs = {plan.site: layer_inputs(layers[plan.site])[0] for plan in fitted}
        seen = collect_for(self, program, inputs, work, "fitting tables")
        for plan in fitted:
            reader, rows = layer_inputs(layers[plan.site])[1], torch.cat(seen.pop(plan.site).rows)
            gram = _gram(plan.site, rows)
            if plan.weight_only:
                name = str(reader.target)
                fit = fit_lookup(state[name].flatten(1), gram, plan.weight_bits or 8, self.rounds)
                state[name] = fit.weight.view(state[name].shape).to(state[name].dtype)
                continue
            name = source_weight(reader)
            weight, grid = state[name].flatten(1), digit_limit(activation_range(plan.activation_bits or 8)[1])
            scale = torch.where(weight.any(1), weight.abs().amax(1) / grid, 1.0).to(torch.float32)
            fit = fit_lookup(weight, gram, plan.weight_bits or 8, self.rounds, scale, grid)
            state[name] = fit.weight.view(state[name].shape).to(state[name].dtype)
            state[f"{plan.site}.weight_scale"] = scale
        return program.evolve(state=state)

    def cost(self, program: Program, work: Work) -> float:
        """One trajectory of every image; the fit runs on rows."""
        return float(work.evaluations(self.samples))


@dataclass(frozen=True)
class LookupFit:
    """codes [O, K], table [O, 2ⁿ] of real values, and the error tr((W - Ŵ)·H·(W - Ŵ)ᵀ)."""

    codes: Tensor
    table: Tensor
    error: float

    @property
    def weight(self) -> Tensor:
        """Ŵ [O, K]."""
        return self.table.gather(1, self.codes)


@torch.no_grad()
def fit_lookup(
    weight: Tensor, gram: Tensor, bits: int, rounds: int, scale: Tensor | None = None, grid: int = 127
) -> LookupFit:
    """The best table and codes that `rounds` alternations find, for every row from the better of two starts.

    weight [O, K]; gram [K, K] = XᵀX. scale [O]: the table holds whole multiples of it up to ±grid; None: any values.
    """
    work, hessian = weight.double(), _damped(gram)
    factor = torch.linalg.cholesky(hessian)
    best: tuple[Tensor, ...] | None = None
    for table in (_uniform(weight, bits), _clustered(work, hessian.diagonal(), bits)):
        for number in range(rounds + 1):
            if scale is not None:
                unit = scale.double().unsqueeze(1)
                table = (table / unit).round().clamp(-grid, grid) * unit
            # The uniform grid rounded to nearest comes first: no row is ever worse.
            codes = _nearest(work, table) if number == 0 else _choose_codes(work, factor, table)
            found = (_row_errors(work - table.gather(1, codes), hessian).unsqueeze(1), codes, table)
            best = found if best is None else _better(best, found)
            table = _solve_table(work, hessian, codes, table)
    assert best is not None
    errors, codes, table = best
    return LookupFit(codes, table, float(errors.sum()))


def fit_bytes(outputs: int, inputs: int) -> int:
    """Bytes that a fit takes at its peak: XᵀX and H in float32, H, L and what makes it in float64, of the weight
    values, codes and residuals of 8 bytes each, and what runs some rows at a time.

    Measured, with one start: 466 MB at 64 × 4096 (estimate 606), 176 at 256 × 2048 (272), 177 at 2048 × 1024 (298).
    """
    return 28 * inputs**2 + 72 * outputs * inputs + 28 * _VALUES_A_CALL


def _gram(site: str, rows: Tensor) -> Tensor:
    """XᵀX.

    Raises:
        TrainingError: if it is not finite, naming the site.
    """
    gram = rows.T @ rows
    if not bool(gram.isfinite().all()):
        found = f"XᵀX of what it reads, up to {float(rows.abs().max()):.3g}, has NaN or infinity"
        raise TrainingError(f"fitting tables at {site}", found, f"Leave it float (--keep-float {site}).")
    return gram


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D·H·Dᵀ), D [O, K]: the squared error of the layer's output, plus the ridge."""
    return float(_row_errors(difference, hessian).sum())


def _row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    return ((difference @ hessian) * difference).sum(1)


def _better(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of two (errors [O, 1], codes, table) the rows with the smaller error, of the first where they are equal."""
    smaller = other[0] < one[0]
    return tuple(torch.where(smaller, b, a) for a, b in zip(one, other, strict=True))


def _damped(gram: Tensor) -> Tensor:
    """H: XᵀX with its ridge, which has an inverse however few rows X had."""
    hessian = gram.to(torch.float64, copy=True)
    hessian.diagonal().add_(_RIDGE * hessian.diagonal().mean().clamp_min(1e-12))  # no copies: it may take gigabytes
    return hessian


def _uniform(weight: Tensor, bits: int) -> Tensor:
    """Values [O, 2ⁿ] of the symmetric grid of a row."""
    low, high = weight_range(bits)
    scale = mse_weight_scale(weight, low, high).double()
    return scale.unsqueeze(1) * torch.arange(low, high + 1, dtype=torch.float64)


def _clustered(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Values [O, 2ⁿ] of Lloyd's k-means of each row, from its quantiles; importance [K]: of the columns."""
    ranks = (torch.arange(2**bits) + 0.5) / 2**bits * weight.shape[1]
    table = weight.sort(1).values[:, ranks.long()]
    mass = importance.expand_as(weight)
    for _ in range(_CLUSTERINGS):
        codes = _nearest(weight, table)
        held = torch.zeros_like(table).scatter_add(1, codes, mass)
        sums = torch.zeros_like(table).scatter_add(1, codes, mass * weight)
        table = torch.where(held > 0, sums / held.clamp_min(1e-300), table)
    return table


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Codes [O, K] of the entries nearest to values [O, K]; the table's rows rise."""
    middles = (table[:, 1:] + table[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), values.contiguous())


def _rows_a_call(values: Tensor, table: Tensor) -> int:
    return max(1, _VALUES_A_CALL // (values.shape[1] * table.shape[1]))


def _choose_codes(weight: Tensor, factor: Tensor, table: Tensor) -> Tensor:
    """The S-step; factor: L. Columns some at a time, so that what is behind a block is one product."""
    codes = torch.empty(weight.shape, dtype=torch.int64)
    residual = torch.zeros_like(weight)
    end = weight.shape[1]
    while end > 0:
        start = max(0, end - _COLUMNS_A_BLOCK)
        behind = residual[:, end:] @ factor[end:, start:end]
        for j in range(end - 1, start - 1, -1):
            carried = behind[:, j - start] + residual[:, j + 1 : end] @ factor[j + 1 : end, j]
            wanted = weight[:, j] + carried / factor[j, j]
            codes[:, j] = (wanted.unsqueeze(1) - table).abs().argmin(1)
            residual[:, j] = weight[:, j] - table.gather(1, codes[:, j : j + 1]).squeeze(1)
        end = start
    return codes


def _solve_table(weight: Tensor, hessian: Tensor, codes: Tensor, table: Tensor) -> Tensor:
    """The T-step, some rows at a time; entries that no code uses stay."""
    rows = _rows_a_call(codes, table)
    single = hessian.to(torch.float32)
    parts = zip(*(torch.split(tensor, rows) for tensor in (weight, codes, table)), strict=True)
    return torch.cat([_solve_rows(part, single, chosen, before) for part, chosen, before in parts])


def _solve_rows(weight: Tensor, hessian: Tensor, codes: Tensor, table: Tensor) -> Tensor:
    chosen = torch.nn.functional.one_hot(codes, table.shape[1]).to(torch.float32)  # [R, K, 2ⁿ]
    spread = (hessian @ chosen.permute(1, 0, 2).flatten(1)).view(len(hessian), *table.shape).permute(1, 0, 2)
    among = chosen.transpose(1, 2).bmm(spread).double()  # S·H·Sᵀ
    wanted = weight.to(torch.float32).unsqueeze(1).bmm(spread).squeeze(1).double()  # S·H·Wᵀ
    unused = chosen.sum(1) == 0
    among += torch.diag_embed(unused.double())
    return torch.linalg.solve(among, torch.where(unused, table, wanted))  # type: ignore[no-any-return]
