"""`hqc::nearest_timestep`: which row of the scale tables a sample uses."""

import torch
from torch import Tensor

__all__ = ["nearest_timestep"]


@torch.library.custom_op("hqc::nearest_timestep", mutates_args=())
def nearest_timestep(timestep: Tensor, grid: Tensor) -> Tensor:
    """Index of the calibrated timestep nearest to each sample's own: argmin_i |timestep[n] - grid[i]|.

    timestep [N] float, grid [T] float -> [N] int64; the first of equals wins.  The graph stays a pure function of
    (sample, timestep, condition): no call counter, so any scheduler and mixed batches are served.
    """
    return (timestep.to(grid.dtype).unsqueeze(1) - grid.unsqueeze(0)).abs().argmin(1)


@nearest_timestep.register_fake
def _(timestep: Tensor, grid: Tensor) -> Tensor:
    return torch.empty(timestep.shape, dtype=torch.int64, device=timestep.device)
