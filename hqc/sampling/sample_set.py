"""A sample set: what the float denoiser was run on along its trajectories, evenly over the timesteps."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hqc.errors import TrainingError
from hqc.program import BATCH, InputSpec, Program
from hqc.sampling.task import Denoise, call_arguments, denoiser
from hqc.sampling.work import Work, evenly

__all__ = ["SampleSet", "collect_samples", "set_size"]


@dataclass(frozen=True)
class SampleSet:
    """Inputs of a denoiser, [M, …] each in the order of the program's, or one value for all where there is no batch."""

    specs: tuple[InputSpec, ...]
    inputs: tuple[Tensor, ...]

    def __len__(self) -> int:
        return max(len(x) for x, spec in zip(self.inputs, self.specs, strict=True) if spec.batched)

    def chunks(self, rows: int) -> Iterator[tuple[Tensor, ...]]:
        """The samples, so many at a time."""
        for start in range(0, len(self), rows):
            yield tuple(
                x[start : start + rows] if spec.batched else x for x, spec in zip(self.inputs, self.specs, strict=True)
            )


def set_size(work: Work, images: int, timesteps: int) -> int:
    """How many samples `collect_samples` gives: both halves of guidance are samples of their own."""
    return images * min(timesteps, work.sampler.num_inference_steps) * work.halves()


def collect_samples(
    work: Work, images: int, timesteps: int, seed: int, what: str, program: Program | None = None
) -> SampleSet:
    """What the teacher is run on while it samples so many images: at so many of the sampler's steps, evenly spread.

    With a forward loop it is what that runs the model on: at so many of the timesteps that it visits, and as many
    samples at each. what: goes on meanwhile. program: samples instead of the teacher. The order is that of the
    trajectory; every random number comes from seed.

    Raises:
        TrainingError: if there is nothing, or NaN, to run it on.
    """
    recorder = _Recorder(program or work.teacher, images * work.halves())
    if work.observe is not None:
        work.observe(recorder)
    else:
        for _ in work.walk(what, recorder, images, seed):
            pass
    return recorder.samples(timesteps)


@dataclass
class _Recorder:
    """The teacher, which keeps what it is run on: at most `each` samples a timestep."""

    teacher: Program
    each: int
    seen: dict[float, list[tuple[Tensor, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._denoise: Denoise = denoiser(self.teacher.module())

    @torch.no_grad()
    def __call__(self, sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        times = timestep.reshape(-1).to(torch.float32).expand(len(sample))
        if not bool(sample.isfinite().all()):
            raise TrainingError(
                "collecting samples",
                f"the model is given NaN or infinity at timestep {float(times[0]):g}",
                "Check the scheduler, and that the weights are finite.",
            )
        self._keep(float(times[0]), call_arguments(sample, times, conditions, timed=self.teacher.has_timestep))
        return self._denoise(sample, times, *conditions)

    def _keep(self, time: float, given: tuple[Tensor, ...]) -> None:
        kept = self.seen.setdefault(time, [])
        left = self.each - sum(len(one[0]) for one in kept)
        if left > 0:  # of both halves of a guided batch, if it is too large
            count = len(given[0])
            rows = evenly(left, count)
            pairs = zip(given, self.teacher.inputs, strict=True)
            kept.append(tuple(x[rows] if spec.batched else x for x, spec in pairs))

    def samples(self, timesteps: int) -> SampleSet:
        """Those of so many of the timesteps."""
        times = list(self.seen)
        if not times:
            raise TrainingError(
                "collecting samples", "the forward loop never called the model", "Call model(sample, timestep, …)."
            )
        parts = [part for place in evenly(timesteps, len(times)) for part in self.seen[times[place]]]
        inputs = [
            torch.cat([part[i] for part in parts]) if BATCH in spec.shape else parts[0][i]
            for i, spec in enumerate(self.teacher.inputs)
        ]
        return SampleSet(self.teacher.inputs, tuple(inputs))
