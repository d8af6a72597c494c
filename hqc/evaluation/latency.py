"""How long one denoiser call takes."""

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hqc.runtimes import Model

__all__ = ["latency_ms"]


@torch.no_grad()
def latency_ms(model: "Model", *, batch: int = 2, repeats: int = 30, warm_up: int = 5) -> float:
    """Median milliseconds of one call on fixed random inputs at the given batch, after a warm-up."""
    generator = torch.Generator().manual_seed(0)
    inputs = [spec.example(batch, generator) for spec in model.session.inputs]
    for _ in range(warm_up):
        model.session(*inputs)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.session(*inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
