"""Learnt boundaries (LBQ): what the quantisers clip at learns along the trajectory, as any tensor does in `distil`."""

from dataclasses import dataclass

from hqc.program import Program
from hqc.training import boundaries
from hqc.training.distil import Distil
from hqc.training.groups import Group

__all__ = ["LearnBounds"]

_RATE = 1e-3


@dataclass(frozen=True)
class LearnBounds(Distil):
    """`distil` of the boundaries B_l and B_u of every trained site's activations and weights.

    The groups name them: `activation_below_table` is -B_l and `activation_above_table` is B_u, `weight_below` and
    `weight_above` those of every output channel; a symmetric range has the upper one alone. The other options are
    those of `distil`. Scales and zero points are computed from the boundaries at every step and in the end.
    """

    groups: tuple[Group, ...] = (
        Group("*.activation_below_table", rate=_RATE, relative="own", positive=True),
        Group("*.activation_above_table", rate=_RATE, relative="own", positive=True),
        Group("*.weight_below", rate=_RATE, relative="own", positive=True),
        Group("*.weight_above", rate=_RATE, relative="own", positive=True),
    )

    def opened(self, program: Program) -> Program:
        """With boundaries in the place of scales and zero points."""
        return boundaries.opened(program)

    def closed(self, learnt: Program, program: Program) -> Program:
        """With the scales and zero points of the learnt boundaries."""
        return boundaries.closed(learnt, program)
