"""Relations over time: which pixels of neighbouring timesteps a pixel is alike, by a queue of the teacher's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hqc.program import Program
from hqc.training.losses.seen import Seen
from hqc.training.losses.temporal_relation import places_of, tapped_block, unit_features
from hqc.training.losses.term import Term

__all__ = ["QueueRelation", "queue_loss"]

_CHUNK_VALUES = 2**22


@dataclass(frozen=True)
class QueueRelation(Term):
    """weight·Σ_i KL(softmax_j S_ij ‖ softmax_j Ŝ_ij), S_ij = cosine of the present pixel i and pixel j of the queue.

    The queue holds unit features of the teacher, the last `queue` of them, over trajectories: j is among those whose
    step of the trajectory is at most `within` away from the present one; where there are none the loss is 0. pixels: so
    many of a step enter it, evenly spread over samples and places. scope: as of `temporal_relation`.
    Source: memory-based temporal relation distillation of MPQ-DMv2 (arXiv 2507.04290), whose formulas were not seen.
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    queue: Annotated[int, Field(ge=1, le=2**20)] = 8192
    within: Annotated[int, Field(ge=0, le=1000)] = 5
    pixels: Annotated[int, Field(ge=1, le=2**20)] = 256
    scope: str = ""

    in_order: ClassVar[bool] = True

    @property
    def key(self) -> str:
        """What the queue and the tap are called."""
        return f"queue of {self.scope or 'the last block'}"

    def taps(self, program: Program) -> Mapping[str, str]:
        """The node that gives the features.

        Raises:
            PlanError: if there is no such block, or its output is neither an image nor tokens.
        """
        return {self.key: tapped_block(program, self.scope, "queue_relation")}

    def chosen(self, features: Tensor) -> Tensor:
        """Pixels [P, C] of the teacher's features, of length one, that enter the queue."""
        flat = unit_features(places_of(features.detach())).flatten(0, 1)
        count = min(self.pixels, len(flat))
        return flat[torch.arange(count) * len(flat) // count]

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        """The loss, a scalar."""
        queue = teacher.queue.get(self.key)
        if queue is None or not len(queue):
            return student.noise.sum() * 0  # with a gradient, of zeros
        ours, theirs = (places_of(seen.taps[self.key]).flatten(0, 1) for seen in (student, teacher))
        found = queue_loss(ours, theirs, queue)
        return found * (self.weight if teacher.weight is None else self.weight * teacher.weight)


def queue_loss(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
    """Σ_i KL(softmax S_i ‖ softmax Ŝ_i) of features [P, C] and unit pixels [M, C]; gradients to the student.

    Rows are computed some at a time, and their gradients with them: [P, M] is never held whole.
    """
    own, other = unit_features(student), unit_features(teacher.detach())
    return _ToQueue.apply(own, other, queue)  # type: ignore[no-any-return,no-untyped-call]


class _ToQueue(torch.autograd.Function):
    """Σ_i KL(p_i ‖ p̂_i) with p = softmax(F·Qᵀ) by row: ∂/∂F̂ = (p̂ - p)·Q."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:  # type: ignore[override]
        total, slopes, rows = student.new_zeros(()), [], max(1, _CHUNK_VALUES // len(queue))
        for ours, theirs in zip(torch.split(student, rows), torch.split(teacher, rows), strict=True):
            wanted, found = ((one @ queue.T).log_softmax(-1) for one in (theirs, ours))
            p = wanted.exp()
            total = total + (p * (wanted - found)).sum()
            slopes.append(found.exp_().sub_(p) @ queue)
        ctx.save_for_backward(torch.cat(slopes))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None
