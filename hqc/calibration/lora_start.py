"""Where a LoRA starts: at what the weight's quantiser leaves of it, instead of nothing.

    E = W - Q(W);  E ≈ U·Σ·Vᵀ of the LoRA's rank;  B = g·U·√Σ,  A = √Σ·Vᵀ

The LoRA is added before the quantiser, so that Q(W + B·A) differs from Q(W) only where the sum crosses a boundary of
the grid: a weight that moves by less than its distance to the next one rounds away. What remains is that W + B·A lies
nearer to the boundaries in the directions of which rounding lost most, so that training crosses those first.
Source: MPQ-DMv2 (arXiv 2507.04290), low-rank initialisation from the quantisation error; its formulas were not seen.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hqc.calibration.low_rank import low_rank
from hqc.calibration.weights import quantised_weight, source_weight
from hqc.errors import PlanError
from hqc.passes.rewriting import layer_inputs
from hqc.program import Program, Stage
from hqc.sampling import Work
from hqc.steps import check_options

__all__ = ["InitLora", "lora_of"]


@dataclass(frozen=True)
class InitLora:
    """Starts every LoRA at the quantisation error of its weight. gain: g, of all of it."""

    gain: Annotated[float, Field(gt=0, le=4, allow_inf_nan=False)] = 1.0

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    samples_denoiser: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, program: Program, work: Work) -> None:
        """Nothing that could be known before."""

    def run(self, program: Program, work: Work) -> Program:
        """The program with other LoRAs.

        Raises:
            PlanError: where none is attached.
        """
        attached = [plan for plan in program.plan.quantised if plan.lora_rank]
        if any(plan.trained for plan in program.plan.quantised) and not attached:
            raise PlanError("init_lora", "no site has a LoRA", "Put attach_lora before it.")
        layers, state = dict(program.sites()), dict(program.state)
        for plan in attached:
            quantiser = layer_inputs(layers[plan.site])[1]
            weight = state[source_weight(quantiser)]
            names = (f"{plan.site}.lora_a", f"{plan.site}.lora_b")
            error = weight - quantised_weight(program, quantiser, weight)
            state |= dict(zip(names, _start(error, state[names[0]], self.gain), strict=True))
        return program.evolve(state=state)

    def cost(self, program: Program, work: Work) -> float:
        """The denoiser is not run."""
        return 0.0


def _start(error: Tensor, start: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """A and B of the error of a weight [O, C, …]; those of taps of each of them."""
    if start.ndim == 2:
        return lora_of(error.flatten(1), start, gain)
    taps = zip(error.flatten(2).unbind(2), start, strict=True)
    down, up = zip(*(lora_of(one, own, gain) for one, own in taps), strict=True)
    return torch.stack(down), torch.stack(up)


@torch.no_grad()
def lora_of(error: Tensor, start: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [O, r] of an error [O, K], r that of `start` [r, K].

    Directions in which there is no error keep their row of `start` and nothing in B, as `attach_lora` leaves them.
    """
    up, down = low_rank(error, len(start))
    lengths = up.norm(dim=0), down.norm(dim=1)
    sizes = lengths[0] * lengths[1]  # the singular values
    there = sizes > 1e-6 * error.norm().clamp_min(1e-30)
    root = torch.where(there, sizes, 0.0).sqrt()
    a = torch.where(there.unsqueeze(1), down * (root / lengths[1].clamp_min(1e-30)).unsqueeze(1), start)
    b = up * (gain * root / lengths[0].clamp_min(1e-30))
    return a.contiguous(), b.contiguous()  # checkpoints hold nothing else
