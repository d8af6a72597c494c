"""Low-rank decomposition: which part of a site's weight its float branch takes over.

    q = 0;  in turns   L = SVD_r(Ŵ - q),  R = Ŵ - L,  q = Q(R)        the best is kept, by output error:

    error = Σ ‖x̂·(q + L - Ŵ)ᵀ‖²                                        over rows of x̂ at some timesteps

The first turn gives the branch the r largest singular directions of the weight, outliers among them; later ones let it
take what rounding has left as well. The turns end at the first that is not better. Ŵ is the weight behind smoothing.
Where it is quantised rotated (W·Ĥ), so is R. Source: SVDQuant (arXiv 2411.05007), as in deepcompressor, there by the
output of a module.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from hqc.bits import weight_range
from hqc.calibration.site_rows import collect_for, require_rows
from hqc.calibration.weights import source_weight, symmetric_weight_scale, with_symmetric_scale
from hqc.passes.insert_qdq import spanning_range, weight_top
from hqc.passes.rewriting import layer_inputs
from hqc.plan import SitePlan
from hqc.program import Program, Stage
from hqc.sampling import Work
from hqc.sites import source_of
from hqc.stages import each
from hqc.steps import check_options

__all__ = ["Decompose", "gram_of_columns", "low_rank"]

_BAND = 192
"""Rows of a Gram matrix that are computed at once: of the upper half only what lies in a band is."""


@dataclass(frozen=True)
class Decompose:
    """Fills the branches that `attach_branch` has put beside the sites, and what they leave in the weights.

    rounds: how many turns at most; candidates: how many scales are tried for a channel of the residual, or a group, see
    `calibrate_weights`. samples: images of the float trajectory; timesteps: how many of its steps are measured, evenly
    spread, on `rows` rows each. seed: of noise, conditions and rows.
    """

    rounds: Annotated[int, Field(ge=1, le=10_000)] = 100
    candidates: Annotated[int, Field(ge=1, le=1000)] = 80
    samples: Annotated[int, Field(ge=1, le=4096)] = 16
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 5
    rows: Annotated[int, Field(ge=1, le=65536)] = 64
    seed: Annotated[int, Field(ge=0)] = 2024

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    samples_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, program: Program, work: Work) -> None:
        """See `require_rows`."""
        require_rows(self, program, work, "decomposing")

    def run(self, program: Program, work: Work) -> Program:
        """The program with branches, residuals and their scales; the plan's reasons say what was left of the error.

        Raises:
            TrainingError: where the sampler meets NaN.
        """
        layers, state, plans = dict(program.sites()), dict(program.state), {}
        branched = [plan for plan in program.plan.sites if plan.branch_rank]
        inputs = {plan.site: source_of(layers[plan.site], through_smoothing=False) for plan in branched}
        seen = collect_for(self, program, inputs, work, "decomposing")
        weights = {plan.site: source_weight(layer_inputs(layers[plan.site])[1]) for plan in branched}
        for plan in each("decomposing weights", branched, lambda plan: state[weights[plan.site]].numel()):
            stored = weights[plan.site]
            up, down = (f"{plan.site}.branch_{name}" for name in ("up", "down"))
            branch = (state[up].flatten(1) @ state[down].flatten(1)).view_as(state[stored])
            weight = _turned(plan, state[stored]) + branch
            found, turns = self._best(plan, weight, weight_top(plan, state), torch.cat(seen[plan.site].rows))
            state[up], state[down] = found.up.view_as(state[up]), found.down.view_as(state[down])
            state[stored] = _turned(plan, (weight.flatten(1) - found.up @ found.down).view_as(weight))
            state[f"{plan.site}.weight_scale"] = found.scale
            if found.zero is not None:
                state[f"{plan.site}.weight_zero"] = found.zero
            plans[plan.site] = _explained(plan, found.error, turns)
        return program.evolve(state=state, plan=program.plan.with_sites(plans))

    def cost(self, program: Program, work: Work) -> float:
        """One trajectory of every image; the turns run on rows."""
        return float(work.evaluations(self.samples))

    @torch.no_grad()
    def _best(self, plan: SitePlan, weight: Tensor, top: Tensor, rows: Tensor) -> tuple["_Split", int]:
        """The split of a weight with the least output error, and in which turn it was found.

        top: 2ⁿ - 1 of its codes where they are asymmetric, one or one a channel.
        """
        flat = weight.flatten(1)
        energy = (rows @ flat.T).square().sum().clamp_min(1e-30)
        best, codes, turn = None, torch.zeros_like(flat), 0
        for turn in range(1, self.rounds + 1):
            up, down = low_rank(flat - codes, plan.branch_rank)
            branch = up @ down
            codes, scale, zero = self._quantised(plan, (flat - branch).view_as(weight), top)
            error = float((rows @ (codes + branch - flat).T).square().sum() / energy)
            if best is not None and error >= best.error:
                return best, turn - 1
            best = _Split(up, down, scale, zero, error)
        assert best is not None
        return best, turn

    def _quantised(self, plan: SitePlan, residual: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Q(R) [O, K], its scales and where they differ its zero points."""
        turned = _turned(plan, residual)
        if plan.weight_symmetric:
            low, high = weight_range(plan.weight_bits or 8)
            scale, zero = symmetric_weight_scale(turned, low, high, self.candidates, plan.weight_group), None
            found = with_symmetric_scale(turned, scale, low, high, plan.weight_group)
        else:
            scale, zero = spanning_range(turned, top)
            found = torch.ops.hqc.fake_quantize_bounded(turned, scale, -zero, top - zero)
        return _turned(plan, found).flatten(1), scale, zero


class _Split(NamedTuple):
    """A branch, the scales of what it leaves, and the squared error of the output over its energy."""

    up: Tensor
    down: Tensor
    scale: Tensor
    zero: Tensor | None
    error: float


@torch.no_grad()
def low_rank(matrix: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """up [O, r] and down [r, K] whose product is the nearest to a matrix [O, K] of that rank.

    The singular vectors of the shorter side are eigenvectors of its Gram matrix. gram: that of the columns [K, K], in
    double precision, where it is known already.
    """
    wide = matrix.to(torch.float64)
    if gram is None and wide.shape[0] <= wide.shape[1]:
        left = _largest_eigenvectors(_gram(wide), rank)
        return left.to(matrix.dtype), (left.T @ wide).to(matrix.dtype)
    right = _largest_eigenvectors(gram_of_columns(wide) if gram is None else gram, rank)
    return (wide @ right).to(matrix.dtype), right.T.to(matrix.dtype).contiguous()


def gram_of_columns(matrix: Tensor) -> Tensor:
    """The lower half of Mᵀ·M [K, K] in double precision, for `low_rank`."""
    return _gram(matrix.to(torch.float64).T)


def _gram(matrix: Tensor) -> Tensor:
    """The lower half of M·Mᵀ, a band of rows at a time; the rest is zero."""
    found = matrix.new_zeros(len(matrix), len(matrix))
    for start in range(0, len(matrix), _BAND):
        end = min(start + _BAND, len(matrix))
        found[start:end, :end] = matrix[start:end] @ matrix[:end].T
    return found


def _largest_eigenvectors(gram: Tensor, count: int) -> Tensor:
    """[n, count] of the largest eigenvalues of a symmetric matrix, of which the lower half is read.

    LAPACK's for some eigenvalues takes a third of the time of the one for all, which is torch's.
    """
    from scipy.linalg import eigh

    size = len(gram)
    _, vectors = eigh(gram.numpy(), lower=True, subset_by_index=(size - min(count, size), size - 1))
    return torch.from_numpy(vectors)


def _turned(plan: SitePlan, weight: Tensor) -> Tensor:
    """A weight as it is quantised, or back: rotated where the plan says so."""
    if not plan.weight_rotated or plan.hadamard is None:
        return weight
    return torch.ops.hqc.hadamard(weight, plan.block, 1, plan.hadamard.regular)  # type: ignore[no-any-return]


def _explained(plan: SitePlan, error: float, turns: int) -> SitePlan:
    note = f"branch of rank {plan.branch_rank}: weight error {100 * error**0.5:.2g} % after {turns} rounds"
    return replace(plan, reason="; ".join(text for text in (plan.reason, note) if text))
