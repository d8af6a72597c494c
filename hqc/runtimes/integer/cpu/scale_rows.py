"""The look-up of scales as steps of a recording: which row a timestep has, and the scales of all sites there."""

import torch
from torch import Tensor

from hqc.runtimes.integer.cpu import steps
from hqc.runtimes.integer.cpu.steps import address, recorder

__all__ = ["look_up", "nearest"]

_ALIGNED = 4


def nearest(timestep: Tensor, grid: Tensor) -> Tensor | None:
    """`hqc::nearest_timestep` of [N] and [T]; None for other numbers than float32."""
    if timestep.dtype != torch.float32 or grid.dtype != torch.float32 or not _close(timestep, grid):
        return None
    rows = torch.empty(len(timestep), dtype=torch.int64, device=timestep.device)
    _write(steps.Nearest(address(timestep), address(grid), address(rows), len(timestep), len(grid)))
    return rows


def look_up(bank: Tensor, row: Tensor) -> Tensor | None:
    """`scales.look_up` of [R, T] or [R, T, 3] and [N], its rows as far apart as there; None for others."""
    if bank.dtype != torch.float32 or row.dtype != torch.int64 or not _close(bank, row):
        return None
    tables, length, *width = bank.shape
    pitch = -(-len(row) // _ALIGNED) * _ALIGNED
    y = torch.empty((tables, pitch, *width), device=bank.device)
    sizes = (tables, length, width[0] if width else 1, len(row), pitch)
    _write(steps.LookUp(address(bank), address(row), address(y), *sizes))
    return y[:, : len(row)]


def _close(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _write(fields: steps.Nearest | steps.LookUp) -> None:
    taker = recorder()
    assert taker is not None
    taker.step(steps.step_of(fields))
