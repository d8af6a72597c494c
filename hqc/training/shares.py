"""A batch in shares: every process runs the denoiser on its own rows, and all know what it gave for the whole batch."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hqc.processes import Processes
from hqc.program import InputSpec
from hqc.sampling.sources import conditions_of
from hqc.sampling.task import Condition, Denoise
from hqc.training.trajectories import State

__all__ = ["shared", "state_rows", "whole_batch"]


def shared(denoise: Denoise, processes: Processes, inputs: Sequence[InputSpec]) -> Denoise:
    """A denoiser of whole batches that runs this process's rows. inputs: of the program, not all of which have rows."""
    if processes.count == 1:
        return denoise
    batched = [spec.batched for spec in conditions_of(inputs)]

    def run(sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        rows = processes.rows(len(sample))
        own = (_of(one, rows, has) for one, has in zip(conditions, batched, strict=False))
        return processes.gathered(denoise(sample[rows], timestep[rows], *own))

    return run


def state_rows(state: State, processes: Processes, inputs: Sequence[InputSpec]) -> State:
    """This process's share of an update's batch."""
    if processes.count == 1:
        return state
    rows, batched = processes.rows(len(state.sample)), [spec.batched for spec in conditions_of(inputs)]
    conditions = state.conditions
    if conditions is not None:
        conditions = (_rows(conditions[0], rows, batched), _rows(conditions[1], rows, batched))  # type: ignore[assignment]
    time_input = state.time_input[rows] if isinstance(state.time_input, Tensor) else state.time_input
    return replace(
        state,
        sample=state.sample[rows],
        wanted=state.wanted[rows],
        conditions=conditions,
        time_input=time_input,
        times=state.times[rows],
    )


def whole_batch(own: Tensor, processes: Processes, halves: int) -> Tensor:
    """What a node gave for the whole batch [halves·N, …], half by half, from what it gave for each process's rows."""
    if processes.count == 1:
        return own
    by_process = torch.chunk(processes.gathered(own), processes.count)
    return torch.cat([torch.chunk(part, halves)[half] for half in range(halves) for part in by_process])


def _rows(condition: Condition | None, rows: slice, batched: Sequence[bool]) -> Condition | None:
    if not isinstance(condition, tuple):
        return _of(condition, rows, batched[0] if batched else True)
    return tuple(_of(one, rows, has) for one, has in zip(condition, batched, strict=False))


def _of(value: Tensor | None, rows: slice, batched: bool) -> Tensor | None:
    return value if value is None or not batched else value[rows]
