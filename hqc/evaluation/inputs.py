"""What a program is run on when it is looked into: a sampler's trajectory in batches, or a few fixed inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.stepping import Run
from hqc.program import Program
from hqc.sampling.task import Denoise, Task, trajectory

__all__ = [
    "FixedInputs",
    "Sampler",
    "fixed_inputs",
    "noise_inputs",
    "sample_in_step",
    "spread",
    "trajectory_inputs",
    "unbatched",
]


@dataclass(frozen=True)
class Sampler:
    """Whose trajectory is observed: `images` in batches, DDIM's eta, classifier-free guidance, the first seed."""

    images: int = 16
    batch_size: int = 8
    num_inference_steps: int = 20
    guidance_scale: float = 1.5
    eta: float = 0.0
    seed: int = 2024


@dataclass
class FixedInputs:
    """Calls of the trajectory that are kept: at some timesteps, the inputs of a few samples each."""

    timesteps: Sequence[float]
    samples: int
    kept: dict[float, tuple[Tensor, ...]] = field(default_factory=dict)
    shared: tuple[int, ...] = ()

    def note(self, timestep: float, args: tuple[Tensor, ...], shared: tuple[int, ...] = ()) -> None:
        """Keeps the last samples of the first call at a wanted timestep: with guidance, those with a condition.

        shared: places of the inputs that have no batch axis.
        """
        if timestep in self.timesteps and timestep not in self.kept:
            self.shared = shared
            self.kept[timestep] = tuple(
                (arg if i in shared else arg[-self.samples :]).clone() for i, arg in enumerate(args)
            )

    def batch(self) -> tuple[Tensor, ...]:
        """All of them as one batch, timesteps ascending.

        Raises:
            EvaluationError: if the trajectory came by none of the timesteps.
        """
        if not self.kept:
            raise EvaluationError("fixed inputs", "the sampler visited none of the timesteps", "Give ones it visits.")
        columns = zip(*(self.kept[t] for t in sorted(self.kept)), strict=True)
        return tuple(parts[0] if i in self.shared else torch.cat(parts) for i, parts in enumerate(columns))


def unbatched(program: Program) -> tuple[int, ...]:
    """Places of the inputs that have no batch axis."""
    return tuple(i for i, spec in enumerate(program.inputs) if not spec.batched)


def spread(values: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` of the values, evenly spread from the first to the last; all of them if there are fewer.

    >>> spread((1.0, 2.0, 3.0, 4.0, 5.0), 3), spread((1.0, 2.0), 5), spread((1.0, 2.0), 1)
    ((1.0, 3.0, 5.0), (1.0, 2.0), (1.0,))
    """
    count = min(count, len(values))
    return tuple(values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count))


def fixed_inputs(task: Task, sampler: Sampler, samples: int, count: int) -> FixedInputs:
    """Will keep `samples` inputs at each of `count` of the sampler's timesteps."""
    times = spread(task.timesteps(sampler.num_inference_steps), count)
    # As the denoiser is given them: in single precision, which a timestep of 0.95 is not.
    times = tuple(torch.tensor(times, dtype=torch.float32).tolist())
    return FixedInputs(times, min(samples, sampler.images, sampler.batch_size))


def sample_in_step(task: Task, denoise: Denoise, sampler: Sampler) -> None:
    """Runs every batch's trajectory, all batches through one timestep before the next."""
    sizes = [sampler.batch_size] * (sampler.images // sampler.batch_size)
    sizes += [rest] if (rest := sampler.images % sampler.batch_size) else []
    options = (sampler.num_inference_steps, sampler.guidance_scale, sampler.eta)
    runs = [trajectory(task, denoise, n, *options, sampler.seed + i) for i, n in enumerate(sizes)]
    for _ in zip_longest(*runs):
        pass


def trajectory_inputs(
    program: Program,
    task: Task,
    sampler: Sampler,
    count: int,
    progress: Callable[[int], None] = lambda calls: None,
) -> tuple[Tensor, ...]:
    """A batch of the sampler's images at each of `count` timesteps, as the program meets them on its own trajectory."""
    run, kept, calls = Run(program), fixed_inputs(task, sampler, sampler.images, count), 0

    def denoise(sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        nonlocal calls
        args = tuple(a for a in (sample, timestep, *conditions) if a is not None)
        kept.note(float(timestep.reshape(-1)[0]), args, unbatched(program))
        calls += 1
        progress(calls)
        return run.finish(run.start(args))

    sample_in_step(task, denoise, sampler)
    return kept.batch()


def noise_inputs(program: Program, samples: int, count: int, seed: int) -> tuple[Tensor, ...]:
    """Normal noise at `count` timesteps of the program's grid, or evenly over the timestep's span without one."""
    specs = {spec.name: spec for spec in program.inputs}
    low, high = (specs["timestep"].span if "timestep" in specs else None) or (0.0, 999.0)
    even = tuple(low + (high - low) * i / max(1, count - 1) for i in range(count))
    times = spread(program.plan.timesteps, count) if program.plan.timesteps else even
    args = dict(zip(specs, program.example_inputs(samples * len(times), seed), strict=True))
    if "timestep" in args:
        args["timestep"] = torch.tensor(times).to(args["timestep"].dtype).repeat_interleave(samples)
    return tuple(args.values())
