"""Both halves of guidance by themselves: what the denoiser gives, before guidance combines it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hqc.program import Program
from hqc.sampling.task import noise_only
from hqc.training.losses.seen import Seen
from hqc.training.losses.term import Term, weighed_squares

__all__ = ["BothHalves"]

_OUTPUT = "denoiser output"


@dataclass(frozen=True)
class BothHalves(Term):
    """weight·Σ w_n·((ε̂_u - ε_u)² + (ε̂_c - ε_c)²); without guidance there is one half, ε_c.

    The guided error is (1 - g)·e_u + g·e_c: errors of the halves that cancel there cost nothing in `GuidedNoise`.
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def taps(self, program: Program) -> Mapping[str, str]:
        """What the program returns."""
        output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
        return {_OUTPUT: output.args[0].name}

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        """The loss, a scalar."""
        return weighed_squares(_noise(student), _noise(teacher), teacher.weight) * self.weight


def _noise(seen: Seen) -> Tensor:
    """ε of every row that the denoiser was run on, without a predicted variance."""
    return torch.cat([noise_only(half, seen.noise) for half in torch.split(seen.taps[_OUTPUT], len(seen.noise))])
