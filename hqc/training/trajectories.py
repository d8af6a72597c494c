"""The states that training visits: trajectories of the sampler, one after the other, reproducible from anywhere."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hqc.checkpoint import Checkpoint
from hqc.errors import ArtefactError
from hqc.sampling import Sampler, Task, guided
from hqc.sampling.task import Condition, Conditions, Denoise, advance, initial_sample, scaled_input, start

__all__ = ["Epochs", "Order", "State", "generator", "walk"]

Order = Literal["sampler", "shuffled", "mixed"]
_OWN = 1_000_003  # a step that no schedule has: whether a trajectory is the student's own, and the order of its steps
_SHUFFLE = 1_000_033


@dataclass(frozen=True)
class State:
    """One update's input: x_t and what is given with it, its conditions, and the teacher's guided noise.

    step: counted from 0 over all epochs. timestep: the scheduler's, the mean where they differ; time_input: what the
    denoiser is given for it, [N] where they differ. times: the scheduler's of every sample, where they differ.
    """

    step: int
    epoch: int
    timestep: float
    time_input: float | Tensor
    sample: Tensor
    conditions: Conditions | None
    wanted: Tensor
    times: tuple[float, ...] = ()

    def weights(self, by_timestep: Mapping[float, float] | None) -> Tensor | float | None:
        """Of its samples; None for 1."""
        if by_timestep is None:
            return None
        if self.times:
            return torch.tensor([by_timestep[t] for t in self.times])
        return by_timestep[self.timestep]


class Epochs:
    """The trajectories of a training, and what of them a checkpoint keeps.

    Every random number comes from (seed, epoch, step), so that a run that was cut goes on to the same bits: a
    trajectory of the teacher is walked again from its start (samplers may have a memory), the student's own is kept.
    """

    def __init__(
        self, task: Task, sampler: Sampler, batch_size: int, seed: int, order: Order, own_share: float, total: int
    ) -> None:
        self._task, self._sampler, self._batch, self._seed = task, sampler, batch_size, seed
        self._order, self._own_share, self._total = order, own_share, total
        self.length = len(task.scheduler(sampler.num_inference_steps).timesteps)
        self.kept: dict[str, Tensor] = {}

    def restore(self, saved: Checkpoint) -> None:
        """Takes the student's own trajectory from a checkpoint, if it is in the middle of one."""
        self.kept = {name: tensor for name, tensor in saved.tensors.items() if name.startswith("own/")}

    def states(self, teacher: Denoise, student: Denoise, first: int) -> Iterator[State]:
        """The states of the updates from `first` on."""
        for epoch in range(first // self.length, -(-self._total // self.length)):
            fresh = epoch * self.length >= first
            for state in self._epoch(teacher, student, epoch, fresh=fresh):
                if first <= state.step < self._total:
                    yield state
                if state.step + 1 >= self._total:
                    return

    def _epoch(self, teacher: Denoise, student: Denoise, epoch: int, *, fresh: bool) -> Iterator[State]:
        own = self._is_own(epoch)
        if fresh:
            self.kept = {}
        states = self._own(teacher, student, epoch) if own else self._walk(teacher, epoch)
        return states if self._order == "sampler" else iter(self._ordered(list(states), epoch))

    def _walk(self, denoise: Denoise, epoch: int) -> Iterator[State]:
        return walk(self._task, self._sampler, denoise, batch_size=self._batch, seed=self._seed, epoch=epoch)

    def _is_own(self, epoch: int) -> bool:
        last = max(1, -(-self._total // self.length) - 1)
        share = self._own_share * epoch / last
        return share > 0 and float(torch.rand(1, generator=generator(self._seed, epoch, _OWN))) < share

    def _own(self, teacher: Denoise, student: Denoise, epoch: int) -> Iterator[State]:
        """The student's trajectory, as it is when the epoch begins, with the teacher's noise on it."""
        if "own/samples" not in self.kept:
            rolled = list(self._walk(student, epoch))
            self.kept = {"own/samples": torch.stack([state.sample for state in rolled])}
        samples = self.kept["own/samples"]
        scheduler = self._task.scheduler(self._sampler.num_inference_steps)
        _, conditions = start(self._task, self._batch, generator(self._seed, epoch, 0))
        if len(samples) != self.length:
            raise ArtefactError("checkpoint", "holds a trajectory of another sampler", "Start again without --resume.")
        for index, timestep in enumerate(scheduler.timesteps):
            time_input = float(timestep) * self._task.time_scale
            with torch.no_grad():
                wanted = guided(teacher, samples[index], time_input, conditions, self._sampler.guidance_scale)
            step = epoch * self.length + index
            yield State(step, epoch, float(timestep), time_input, samples[index], conditions, wanted)

    def _ordered(self, states: list[State], epoch: int) -> list[State]:
        shuffle = generator(self._seed, epoch, _SHUFFLE)
        if self._order == "shuffled":
            order = torch.randperm(len(states), generator=shuffle).tolist()
            return [replace(states[place], step=states[index].step) for index, place in enumerate(order)]
        pairs = torch.randperm(len(states) * self._batch, generator=shuffle)
        return [_mixed(states, part, states[i].step) for i, part in enumerate(torch.split(pairs, self._batch))]


def _mixed(states: Sequence[State], chosen: Tensor, step: int) -> State:
    """A batch of (state, sample) pairs, numbered state by state."""
    batch = len(states[0].sample)
    pairs = [divmod(int(number), batch) for number in chosen]
    times = tuple(states[t].timestep for t, _ in pairs)
    inputs = torch.tensor([float(states[t].time_input) for t, _ in pairs])
    rows = torch.tensor([n for _, n in pairs])
    sample = torch.stack([states[t].sample[n] for t, n in pairs])
    wanted = torch.stack([states[t].wanted[n] for t, n in pairs])
    conditions = states[0].conditions
    if conditions is not None:
        conditions = (_rows(conditions[0], rows), _rows(conditions[1], rows))  # type: ignore[assignment]
    return State(step, states[0].epoch, sum(times) / batch, inputs, sample, conditions, wanted, times)


def _rows(condition: Condition | None, rows: Tensor) -> Condition | None:
    if condition is None or isinstance(condition, Tensor):
        return None if condition is None else condition[rows]
    return tuple(None if one is None else one[rows] for one in condition)


def walk(task: Task, sampler: Sampler, denoise: Denoise, *, batch_size: int, seed: int, epoch: int) -> Iterator[State]:
    """One trajectory of `denoise`: its steps with what it gives there."""
    scheduler = task.scheduler(sampler.num_inference_steps)
    length = len(scheduler.timesteps)
    noise, conditions = start(task, batch_size, generator(seed, epoch, 0))
    sample = initial_sample(task, scheduler, noise)
    for index, timestep in enumerate(scheduler.timesteps):
        time_input = float(timestep) * task.time_scale
        model_input = scaled_input(task, scheduler, sample, timestep)
        with torch.no_grad():
            wanted = guided(denoise, model_input, time_input, conditions, sampler.guidance_scale)
        sample = advance(scheduler, wanted, timestep, sample, sampler.eta, generator(seed, epoch, index + 1))
        step = epoch * length + index
        yield State(step, epoch, float(timestep), time_input, model_input, conditions, wanted)


def generator(*numbers: int) -> torch.Generator:
    """A generator seeded by (seed, epoch, step): three numbers mixed into one 63-bit seed."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)
