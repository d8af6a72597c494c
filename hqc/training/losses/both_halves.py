"""Both halves of guidance by themselves: what the denoiser gives, before guidance combines it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hqc.program import Program
from hqc.sampling.task import noise_only
from hqc.steps import check_options
from hqc.training.losses.guided_noise import weighed_squares
from hqc.training.losses.seen import Seen

__all__ = ["BothHalves"]

_OUTPUT = "denoiser output"


@dataclass(frozen=True)
class BothHalves:
    """weight·Σ w_n·((ε̂_u - ε_u)² + (ε̂_c - ε_c)²); without guidance there is one half, ε_c.

    The guided error is (1 - g)·e_u + g·e_c: errors of the halves that cancel there cost nothing in `GuidedNoise`.
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    window: ClassVar[int] = 1
    in_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def taps(self, program: Program) -> Mapping[str, str]:
        """What the program returns."""
        output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
        return {_OUTPUT: output.args[0].name}

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        """The loss, a scalar."""
        found, wanted = _noise(student), _noise(teacher)
        weight = teacher.weight
        if isinstance(weight, Tensor):
            weight = weight.repeat(len(found) // len(weight))
        return weighed_squares(found, wanted, weight) * self.weight


def _noise(seen: Seen) -> Tensor:
    """ε of every row that the denoiser was run on, without a predicted variance."""
    return torch.cat([noise_only(half, seen.noise) for half in torch.split(seen.taps[_OUTPUT], len(seen.noise))])
