"""Learnt equivalent transformation (LET): factors and shifts of smoothing learn along the trajectory."""

from dataclasses import dataclass
from typing import ClassVar

from hqc.program import Program, Stage
from hqc.training import factors
from hqc.training.distil import Distil
from hqc.training.groups import Group

__all__ = ["LearnFactors"]


@dataclass(frozen=True)
class LearnFactors(Distil):
    """`distil` of the factors and shifts that `insert_smoothing` has put in front of the sites.

    The groups name them: `smoothing`, which is 1/λ, and `shift`. The other options are those of `distil`. Weights and
    biases follow at every step and are folded in the end; every quantiser spans what it meets at every step, so that
    scales are calibrated afterwards.
    """

    groups: tuple[Group, ...] = (
        Group("*.smoothing", rate=1e-3, relative="own", positive=True),
        Group("*.shift", rate=1e-3, relative="own"),
    )

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None

    def opened(self, program: Program) -> Program:
        """With live factors, and quantisers that span what they meet."""
        return factors.opened(program)

    def closed(self, learnt: Program, program: Program) -> Program:
        """With the learnt factors folded into weights and biases."""
        return factors.closed(learnt, program)
