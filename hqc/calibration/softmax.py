"""Which steps the quantiser of each softmax has at each timestep: even ones, or powers of two.

    u = 2p/s for the probabilities p of at least half an even step s: those that even steps do not round to 0
    power law      f(u) = α·u^-(α+1),         α = n/Σ ln u          (maximum likelihood)
    exponential    f(u) = λ·e^(-λ(u-1)),      λ = n/Σ (u-1)
    R = Σ ln f_power(u) - Σ ln f_exponential(u) = n·ln(Σ(u-1)/Σ ln u) - Σ ln u         R > 0: powers of two

A softmax with a heavy tail has a few large probabilities and many small ones over many octaves, of which even steps
keep little; powers of two keep their ratios. Where probabilities are nearly equal, even steps are the finer ones, and
the exponential is the likelier. Three sums decide, so that nothing is stored. Source: TCAQ-DM (arXiv 2412.16700), its
dynamically adaptive quantiser. The exponential as what the power law is held against, and where the tail begins, are
the project's own choices: they are not published.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from hqc.calibration.activations import nearest_rows
from hqc.calibration.watching import WatchedRun
from hqc.errors import TrainingError
from hqc.memory import require_call_memory
from hqc.passes.insert_attention_qdq import ATTENTION_GRID
from hqc.program import Program, Stage
from hqc.sampling import Work
from hqc.steps import check_options

__all__ = ["ChooseSoftmax", "Tail"]


@dataclass
class Tail:
    """Sums over the probabilities of a softmax that are at least half an even step."""

    count: int = 0
    logarithms: float = 0.0
    excess: float = 0.0

    def add(self, p: Tensor, step: float) -> None:
        """Takes probabilities; step: the size of even steps."""
        u = p.double() * (2 / step)
        u = u[u >= 1]
        self.count += u.numel()
        self.logarithms += float(u.log().sum())
        self.excess += float((u - 1).sum())

    @property
    def ratio(self) -> float:
        """R, the logarithm of the ratio of likelihoods: above 0 the power law is the likelier; 0 without a tail."""
        if not self.logarithms > 0:
            return 0.0
        return self.count * math.log(self.excess / self.logarithms) - self.logarithms


@dataclass(frozen=True)
class ChooseSoftmax:
    """Gives every quantised softmax powers of two at the timesteps where its probabilities follow a power law.

    samples: images of the float trajectory that they are of. seed: of the noise and the conditions.
    """

    samples: Annotated[int, Field(ge=1, le=4096)] = 16
    seed: Annotated[int, Field(ge=0)] = 2024

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    samples_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, program: Program, work: Work) -> None:
        """All images are one batch, twice as large with guidance.

        Raises:
            MemoryShortError: if that does not fit.
        """
        if work.observe is None:
            what, do = f"choosing quantisers on {self.samples} images", "Take fewer (--set choose_softmax.samples=2)"
            require_call_memory(what, program, self.samples * work.halves(), do)

    def run(self, program: Program, work: Work) -> Program:
        """The program with other tables of kinds; itself if no softmax is quantised.

        Raises:
            TrainingError: for NaN or infinity, naming the softmax and the timestep.
        """
        if not _quantised(program):
            return program
        watcher = _Watcher(program)
        work.loop("choosing softmax quantisers", self.samples, self.seed)(watcher)
        return program.evolve(state={**program.state, **_tables(program, watcher.tails)})

    def cost(self, program: Program, work: Work) -> float:
        """One trajectory of every image."""
        return float(work.evaluations(self.samples))


def _quantised(program: Program) -> list[str]:
    """The names of the quantised softmaxes."""
    return [str(n.meta["site"]) for n in program.graph.nodes if n.meta.get("role") == "softmax_quantizer"]


def _tables(program: Program, tails: Mapping[tuple[str, int], Tail]) -> dict[str, Tensor]:
    """A row that no timestep was near takes the nearest that one was."""
    found = {}
    for name in _quantised(program):
        table, visited = f"{name}.log2_table", [row for one, row in tails if one == name]
        if not visited:
            raise TrainingError(
                "choosing softmax quantisers", "the forward loop never called the model", "Call model(sample, …)."
            )
        nearest = nearest_rows(visited, len(program.state[table]))
        found[table] = torch.tensor([float(tails[name, row].ratio > 0) for row in nearest])
    return found


class _Watcher(WatchedRun):
    """Takes the sums of every softmax."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.tails: dict[tuple[str, int], Tail] = {}

    def see(self, node: fx.Node, value: Any) -> None:
        if node.meta.get("role") != "softmax_quantizer":
            return
        name, grid = str(node.meta["site"]), self.program.state[ATTENTION_GRID]
        row = int((self.timestep - grid).abs().argmin())
        if not bool(value.isfinite().all()):
            raise self.not_finite(f"choosing quantisers at {name}", float(grid[row]))
        step = float(self.program.state[f"{name}.activation_scale_table"][row])
        self.tails.setdefault((name, row), Tail()).add(value, step)
