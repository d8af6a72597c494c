"""What a procedure may need besides the program: the float graph, what to sample, and where a killed one goes on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from hqc.checkpoint import Checkpoint
from hqc.errors import TrainingError
from hqc.processes import ALONE, Processes
from hqc.program import Program
from hqc.sampling.sampler import Sampler
from hqc.sampling.task import Denoise, Task, called_once, trajectory
from hqc.stages import doing

__all__ = ["Observe", "Update", "Validation", "Work", "evenly"]

Observe = Callable[[Denoise], None]
"""Runs the denoiser that it is given on whatever it likes, one timestep a call."""


def evenly(count: int, places: int) -> list[int]:
    """So many of 0 … places - 1, evenly spread, the ends among them; all where there are no more.

    >>> evenly(3, 20), evenly(5, 2)
    ([0, 10, 19], [0, 1])
    """
    return torch.linspace(0, places - 1, min(count, places)).round().int().tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Update:
    """One update: its number from 1, of how many, the timestep, the loss (sum of squares), mean squares, seconds."""

    step: int
    total: int
    epoch: int
    timestep: float
    loss: float
    relative_error: float
    seconds: float


@dataclass(frozen=True)
class Validation:
    """After how many updates; by timestep Σ(ε̂ - ε)²/Σε² and the gain Σ⟨ε̂, ε⟩/Σε² on a held-out trajectory."""

    step: int
    timesteps: tuple[float, ...]
    relative_error: tuple[float, ...]
    gain: tuple[float, ...]


@dataclass(frozen=True)
class Work:
    """Around the program of a run.

    teacher: the captured float program. task: what to sample, once where the sampler says so; None with `observe` only.
    observe: calibrates instead of the sampler. checkpoint: where the step was when it was killed. on_checkpoint,
    on_update, on_validation: hear of its progress. unquantised: the float program as the passes in front of the
    quantisers left it: equal numbers, and the names of nodes and sites that the program of the run has; None: the
    teacher has them. processes: that train together, of which this is one.
    """

    teacher: Program
    task: Task | None = None
    sampler: Sampler = field(default_factory=Sampler)
    observe: Observe | None = None
    checkpoint: Checkpoint | None = None
    on_checkpoint: Callable[[Checkpoint], None] | None = None
    on_update: Callable[[Update], None] | None = None
    on_validation: Callable[[Validation], None] | None = None
    unquantised: Program | None = None
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        if self.task is not None:
            object.__setattr__(self, "task", called_once(self.task, self.sampler.timestep))

    @property
    def sampled(self) -> Task:
        """The task.

        Raises:
            TrainingError: if there is none.
        """
        if self.task is None:
            raise TrainingError("training", "there is nothing to sample", "Give task=… besides the forward loop.")
        return self.task

    def walk(self, what: str, denoise: Denoise, samples: int, seed: int) -> Iterator[int]:
        """Runs the sampler with `denoise` on so many images and yields each step before it is made, from 0.

        what: goes on meanwhile, for the lines that are printed of it.
        """
        sampler = self.sampler
        steps = len(self.sampled.scheduler(sampler.num_inference_steps).timesteps)
        options = (sampler.num_inference_steps, sampler.guidance_scale, sampler.eta, seed)
        with doing(what) as stage:
            for step, _ in enumerate(trajectory(self.sampled, denoise, samples, *options)):
                stage(step, steps)
                yield step

    def loop(self, what: str, samples: int, seed: int) -> Observe:
        """What calibrates: the forward loop that was given, or the float trajectory of so many images."""

        def walk(denoise: Denoise) -> None:
            for _ in self.walk(what, denoise, samples, seed):
                pass

        return self.observe or walk

    def evaluations(self, samples: int) -> int:
        """Of the denoiser on one sample, for one trajectory of so many images."""
        return samples * self.halves() * self.sampler.num_inference_steps

    def halves(self) -> int:
        """How many samples the denoiser is run on for one: two with guidance."""
        return 2 if self.task is not None and self.task.doubles(self.sampler.guidance_scale) else 1
