"""What every launcher does: options with errors in our words, output tensors, the launch itself."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqc.errors import KernelError
from hqc.kernels.guards import check_tensor
from hqc.kernels.options import MODULES, KernelOptions

__all__ = ["kernel_options", "launch_kernel", "output_tensor"]

_LARGEST_GRID = 65535


def kernel_options(where: str, kind: type[KernelOptions], /, **fields: Any) -> Any:
    """Options of a kernel.

    Raises:
        KernelError: for options that do not go together.
    """
    try:
        return kind(**fields)
    except ValueError as error:
        raise KernelError(where, str(error), "Choose other options.") from error


def output_tensor(
    where: str, out: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`out` if it fits, else a new tensor.

    Raises:
        KernelError: if it has another shape or dtype.
    """
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    check_tensor(where, "out", out, dtype=dtype, shape=shape)
    return out


def launch_kernel(
    where: str, options: KernelOptions, grid: tuple[int, ...], arguments: tuple[Tensor | int | None, ...]
) -> None:
    """Runs a kernel over a grid.

    Raises:
        KernelError: for a grid that CUDA does not take, or a tile that needs more than the card has.
    """
    if max(grid[1:], default=0) > _LARGEST_GRID:
        found = f"the grid is {grid}, expected at most {_LARGEST_GRID} after the first"
        raise KernelError(where, found, "Split the batch.")
    kernel = getattr(importlib.import_module(f"hqc.kernels.jit.{MODULES[options.function]}"), options.function)
    constants = {name: value for name, value in options.constants().items() if not name.endswith("_ptr")}
    # No contraction of a·b + c into one rounding: results are those of the reference, operation by operation.
    settings = {"num_warps": options.num_warps, "num_stages": options.num_stages, "enable_fp_fusion": False}
    try:
        kernel[grid](*arguments, **constants, **settings)
    except Exception as error:
        if type(error).__name__ != "OutOfResources":  # triton's, which is not imported here
            raise
        found = " ".join(str(error).split())
        raise KernelError(
            where, f"a tile of {options.function} does not fit the card: {found}", "Report it."
        ) from error
