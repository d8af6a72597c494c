"""Queues of what the teacher has computed: pixels of its features, each with its step of the trajectory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hqc.checkpoint import Checkpoint
from hqc.training.losses import Loss, QueueRelation, Values

__all__ = ["Queues"]

_PIXELS, _STEPS = "queue/pixels/", "queue/steps/"


class Queues:
    """One queue, first in, first out, for every block that a loss asks for; it outlives trajectories.

    whole: the teacher's values of the whole batch from those of this process's rows, so that all have the same queue.
    """

    def __init__(self, losses: Sequence[Loss], whole: Callable[[Tensor], Tensor] = lambda own: own) -> None:
        self._whole = whole
        self._losses = [loss for loss in losses if isinstance(loss, QueueRelation)]
        self._pixels: dict[str, Tensor] = {}  # [M, C], the oldest first
        self._steps: dict[str, Tensor] = {}  # [M]

    def near(self, step: int) -> Values:
        """By the losses' names the pixels of steps that are near enough to one of a trajectory."""
        found = {}
        for loss in self._losses:
            if loss.key in self._pixels:
                close = (self._steps[loss.key] - step).abs() <= loss.within
                found[loss.key] = self._pixels[loss.key][close]
        return found

    def add(self, teacher: Values, step: int) -> None:
        """A step was made."""
        for loss in self._losses:
            new = loss.chosen(self._whole(teacher[loss.key]))
            steps = torch.full((len(new),), step)
            old = self._pixels.get(loss.key, new[:0]), self._steps.get(loss.key, steps[:0])
            self._pixels[loss.key] = torch.cat([old[0], new])[-loss.queue :]
            self._steps[loss.key] = torch.cat([old[1], steps])[-loss.queue :]

    def snapshot(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {
            f"{prefix}{key}": value.clone()
            for prefix, kept in ((_PIXELS, self._pixels), (_STEPS, self._steps))
            for key, value in kept.items()
        }

    def restore(self, saved: Checkpoint) -> None:
        """Takes them from a checkpoint."""
        for prefix, kept in ((_PIXELS, self._pixels), (_STEPS, self._steps)):
            kept |= {n.removeprefix(prefix): t for n, t in saved.tensors.items() if n.startswith(prefix)}
