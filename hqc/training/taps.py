"""Taps: the values of some nodes of teacher and student besides their noise, for the losses that ask for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hqc.checkpoint import Checkpoint
from hqc.processes import ALONE, Processes
from hqc.program import Program
from hqc.sampling.task import denoiser
from hqc.training.losses import Loss, Values

__all__ = ["Before", "Tapped", "taps_of"]

_EPOCH, _OWN = "tap/epoch", "tap/"


def taps_of(losses: Sequence[Loss], program: Program) -> dict[str, str]:
    """The nodes that the losses ask for in a program, by the losses' own names of them."""
    return {name: node for loss in losses for name, node in loss.taps(program).items()}


class Tapped:
    """A denoiser that keeps the values of some nodes of its last call.

    module: a program's own, which is changed. taps: nodes by name.
    """

    def __init__(self, module: Any, taps: Mapping[str, str]) -> None:
        self.values: Values = {}
        self._names = tuple(taps)
        if taps:
            _give(module, [taps[name] for name in self._names])
        self._denoise = denoiser(module)

    def __call__(self, sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        """ε; see `denoiser`."""
        found: Any = self._denoise(sample, timestep, *conditions)
        if not self._names:
            return found  # type: ignore[no-any-return]
        noise, *values = found
        self.values = dict(zip(self._names, values, strict=True))
        return noise  # type: ignore[no-any-return]


def _give(module: fx.GraphModule, nodes: Sequence[str]) -> None:
    """More results of a module: (ε, value, …)."""
    named = {node.name: node for node in module.graph.nodes}
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    output.args = ((output.args[0], *(named[name] for name in nodes)),)
    module.recompile()


class Before:
    """What the taps gave in the steps before, without gradients; forgotten where a trajectory begins."""

    def __init__(self, losses: Sequence[Loss]) -> None:
        self._count = max((loss.window for loss in losses), default=1) - 1
        self._epoch = -1
        self._kept: list[tuple[Values, Values]] = []

    def begin(self, epoch: int) -> tuple[tuple[Values, ...], tuple[Values, ...]]:
        """Those of the student and of the teacher, the latest last, for a step of a trajectory."""
        if epoch != self._epoch:
            self._epoch, self._kept = epoch, []
        return tuple(student for student, _ in self._kept), tuple(teacher for _, teacher in self._kept)

    def add(self, student: Values, teacher: Values) -> None:
        """A step was made."""
        if self._count:
            detached = tuple({name: value.detach() for name, value in one.items()} for one in (student, teacher))
            self._kept = [*self._kept, (detached[0], detached[1])][-self._count :]

    def snapshot(self, processes: Processes = ALONE) -> dict[str, Tensor]:
        """For a checkpoint: the rows of all processes, one process after the other."""
        found = {_EPOCH: torch.tensor(self._epoch)} if self._count else {}
        for place, pair in enumerate(self._kept):
            for who, values in zip(("student", "teacher"), pair, strict=True):
                own = ((name, processes.gathered(value).clone()) for name, value in values.items())
                found |= {f"{_OWN}{place}/{who}/{name}": value for name, value in own}
        return found

    def restore(self, saved: Checkpoint, processes: Processes = ALONE) -> None:
        """Takes this process's rows from a checkpoint of as many processes."""
        if _EPOCH not in saved.tensors:
            return
        self._epoch = int(saved.tensors[_EPOCH])
        places: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        for name, value in sorted(saved.tensors.items()):
            if name.startswith(_OWN) and name != _EPOCH:
                place, who, own = name.removeprefix(_OWN).split("/", 2)
                rows = torch.chunk(value, processes.count)[processes.rank]
                places.setdefault(int(place), ({}, {}))[who == "teacher"][own] = rows
        self._kept = [places[place] for place in sorted(places)]
