"""Calibration batches in a file, for the tools that quantise peers in processes of their own."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Batch", "read_batches", "write_batches"]

Batch = dict[str, NDArray[np.float32]]


def write_batches(path: Path, batches: list[Batch]) -> None:
    """Calibration batches as one .npz: `0.sample`, `0.timestep`, `1.sample`, …"""
    np.savez(path, **{f"{i}.{name}": array for i, batch in enumerate(batches) for name, array in batch.items()})  # type: ignore[arg-type]


def read_batches(path: Path) -> Iterator[Batch]:
    """What `write_batches` wrote, in order."""
    with np.load(path, allow_pickle=False) as stored:
        count = 1 + max(int(key.partition(".")[0]) for key in stored.files)
        for i in range(count):
            prefix = f"{i}."
            yield {key.removeprefix(prefix): stored[key] for key in stored.files if key.startswith(prefix)}
