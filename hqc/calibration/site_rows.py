"""What the sites of a float program read along a trajectory: the largest value of every channel, and some rows.

A row is one token, or the window of one output pixel of a convolution, [C·kh·kw] as its weight is. With rows X and a
weight W a layer is X·Wᵀ, so that a search may try any number of weights and scales without running the denoiser again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.nn import functional

from hqc.calibration.watching import WatchedRun
from hqc.memory import require_call_memory, require_memory
from hqc.passes.rewriting import CONV, channel_axis
from hqc.program import Program, is_op
from hqc.sampling import Work, evenly
from hqc.steps import step_name

__all__ = ["ReadsRows", "SiteRows", "collect", "collect_for", "require_rows"]


@dataclass
class SiteRows:
    """Of one site: max|x| a channel [C] over every step and at each, rows [n, C·kh·kw] of each that is measured."""

    largest: Tensor
    rows: list[Tensor] = field(default_factory=list)
    steps: dict[int, Tensor] = field(default_factory=dict)
    span: tuple[Tensor, Tensor] | None = None

    def centred(self) -> tuple[Tensor, "SiteRows"]:
        """The middle δ of every channel's values [C], and what is seen of x - δ, where a row is [C].

        Steps stay those of x.
        """
        assert self.span is not None
        low, high = self.span
        middle = (low + high) / 2
        return middle, SiteRows((high - low) / 2, [rows - middle for rows in self.rows], self.steps)


class ReadsRows(Protocol):
    """A step that watches the sites: `samples` images, `rows` rows at each of `timesteps` steps, drawn by `seed`."""

    @property
    def samples(self) -> int: ...
    @property
    def timesteps(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def seed(self) -> int: ...


def require_rows(step: ReadsRows, program: Program, work: Work, what: str, timesteps: int | None = None) -> None:
    """Refuses to start what does not fit: all images as one batch, twice as large with guidance, rows of every site.

    timesteps: that give rows, where they are not the step's.

    Raises:
        MemoryShortError: with the numbers. TrainingError: if there is nothing to sample.
    """
    name, samples = step_name(type(step)), step.samples * work.halves()
    what, _ = f"{what} by {step.samples} images", work.sampled
    require_call_memory(what, program, samples, f"Take fewer images (--set {name}.samples=2)")
    weights = (layer.args[1].meta["shape"] for _, layer in program.sites())  # type: ignore[union-attr]
    columns = sum(math.prod(shape[1:]) for shape in weights)
    rows = step.rows * (step.timesteps if timesteps is None else timesteps)
    if rows:
        require_memory(what, program.size_bytes() + 4 * rows * columns, f"Take fewer rows (--set {name}.rows=16)")


def collect_for(
    step: ReadsRows,
    program: Program,
    inputs: Mapping[str, fx.Node],
    work: Work,
    what: str,
    timesteps: int | None = None,
) -> dict[str, SiteRows]:
    """`collect` with the numbers of a step; timesteps: that give rows, where they are not the step's."""
    measured = step.timesteps if timesteps is None else timesteps
    return collect(
        program, inputs, work, what, samples=step.samples, timesteps=measured, rows=step.rows, seed=step.seed
    )


def collect(
    program: Program,
    inputs: Mapping[str, fx.Node],
    work: Work,
    what: str,
    *,
    samples: int,
    timesteps: int,
    rows: int,
    seed: int,
) -> dict[str, SiteRows]:
    """Samples images with the program, its quantisers bypassed, and watches the node that each site reads.

    inputs: by site. what: goes on meanwhile. timesteps: how many steps give rows, evenly spread; rows: of each.

    Raises:
        TrainingError: for NaN or infinity, naming site and timestep.
    """
    watcher = _Watcher(program, inputs, rows, torch.Generator().manual_seed(seed))
    steps = len(work.sampled.scheduler(work.sampler.num_inference_steps).timesteps)
    measured = set(evenly(timesteps, steps))
    for step in work.walk(what, watcher, samples, seed):
        watcher.begin_step(step, measuring=step in measured)
    return watcher.found


class _Watcher(WatchedRun):
    """Takes what every site reads. One step may call it more than once: each call gives rows."""

    def __init__(self, program: Program, inputs: Mapping[str, fx.Node], count: int, generator: torch.Generator) -> None:
        super().__init__(program)
        self.found: dict[str, SiteRows] = {}
        self._count, self._generator, self._step, self._measuring = count, generator, 0, False
        layers = dict(program.sites())
        self._readers: dict[str, list[tuple[str, fx.Node]]] = {}
        for site, node in inputs.items():
            self._readers.setdefault(node.name, []).append((site, layers[site]))

    def begin_step(self, step: int, *, measuring: bool) -> None:
        """A step of the trajectory begins."""
        self._step, self._measuring = step, measuring

    def see(self, node: fx.Node, value: Any) -> None:
        for site, layer in self._readers.get(node.name, ()):
            self._see(site, layer, value)

    def _see(self, site: str, layer: fx.Node, x: Tensor) -> None:
        low, high = x.transpose(0, channel_axis(layer)).flatten(1).aminmax(dim=1)
        largest = torch.maximum(-low, high)
        if not bool(largest.isfinite().all()):
            raise self.not_finite(f"what {site} reads", self.timestep)
        seen = self.found.setdefault(site, SiteRows(torch.zeros_like(largest)))
        seen.largest = torch.maximum(seen.largest, largest)
        before = seen.span or (low, high)
        seen.span = torch.minimum(before[0], low), torch.maximum(before[1], high)
        seen.steps[self._step] = torch.maximum(seen.steps.get(self._step, largest), largest)
        if self._measuring:
            seen.rows.append(_rows(layer, x, self._count, self._generator))


def _rows(layer: fx.Node, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of random tokens or windows."""
    if not is_op(layer, CONV):
        tokens = x.reshape(-1, x.shape[-1])
        return tokens[torch.randint(len(tokens), (count,), generator=generator)]
    stride, padding, dilation = (_pair(layer, at, usual) for at, usual in ((3, 1), (4, 0), (5, 1)))
    kernel = layer.args[1].meta["shape"][2:]  # type: ignore[union-attr]
    padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    places = [torch.randint(len(x), (count,), generator=generator).view(-1, 1, 1)]
    for axis in (0, 1):
        outputs = (padded.shape[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        first = torch.randint(outputs, (count, 1), generator=generator) * stride[axis]
        places.append((first + dilation[axis] * torch.arange(kernel[axis])).view(count, *((-1, 1), (1, -1))[axis]))
    windows = padded.permute(0, 2, 3, 1)[places[0], places[1], places[2]]  # [count, kh, kw, C]
    return windows.permute(0, 3, 1, 2).flatten(1)


def _pair(layer: fx.Node, at: int, usual: int) -> list[int]:
    return list(layer.args[at]) if len(layer.args) > at else [usual, usual]  # type: ignore[arg-type]
