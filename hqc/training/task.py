"""What is sampled while calibrating and training: scheduler, latents, conditions; and how guidance combines."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqc.errors import TrainingError
from hqc.program import InputSpec

__all__ = [
    "Denoise",
    "Task",
    "class_conditional_task",
    "guided",
    "synthetic_task",
    "trajectory",
    "unconditional_task",
]

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(sample [N, C, H, W], timestep [N], condition [N, L, D] or None) -> noise [N, C, H, W]."""


@dataclass(frozen=True)
class Task:
    """How to draw what the denoiser is run on.

    new_scheduler: a fresh diffusers scheduler. latent_shape: (C, H, W). draw_conditions: (n, generator) -> conditions
    [n, L, D], or None for an unconditional model. unconditional: n -> the null conditions of guidance [n, L, D].
    """

    new_scheduler: Callable[[], Any]
    latent_shape: tuple[int, int, int]
    draw_conditions: Callable[[int, torch.Generator], Tensor] | None = None
    unconditional: Callable[[int], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.draw_conditions is None) != (self.unconditional is None):
            has, lacks = ("draw_conditions", "unconditional")[:: -1 if self.draw_conditions is None else 1]
            raise TrainingError("Task", f"has {has} without {lacks}", "Give both, or neither for an unconditional one.")

    def timesteps(self, num_inference_steps: int) -> tuple[float, ...]:
        """The sampler's timesteps: the grid of the scale tables, ascending."""
        scheduler = self.new_scheduler()
        scheduler.set_timesteps(num_inference_steps)
        return tuple(sorted({float(t) for t in scheduler.timesteps}))


def class_conditional_task(pipeline: Any) -> Task:
    """The task of a `ClassConditionalLDMPipeline`: uniform random classes, its null class for guidance.

    Raises:
        TrainingError: if the pipeline has no class embedder.
    """
    embedder = getattr(pipeline, "class_embedder", None)
    if embedder is None:
        raise TrainingError(
            type(pipeline).__name__,
            "has no class embedder, so hqc cannot draw conditions for it",
            "Call hqc.qat(program, recipe, task=Task(...)) from Python with your own conditions.",
        )
    null_class = embedder.config.num_classes
    config = pipeline.unet.config
    size = config["sample_size"]

    @torch.no_grad()
    def draw(n: int, generator: torch.Generator) -> Tensor:
        return embedder(torch.randint(0, null_class, (n,), generator=generator)).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def null(n: int) -> Tensor:
        return embedder(torch.full((n,), null_class)).float()  # type: ignore[no-any-return]

    kind, scheduler_config = type(pipeline.scheduler), pipeline.scheduler.config
    return Task(lambda: kind.from_config(scheduler_config), (config["in_channels"], size, size), draw, null)


def unconditional_task(pipeline: Any) -> Task:
    """The task of an `UnconditionalLDMPipeline`: noise alone."""
    config = pipeline.unet.config
    size, kind, scheduler_config = config["sample_size"], type(pipeline.scheduler), pipeline.scheduler.config
    return Task(lambda: kind.from_config(scheduler_config), (config["in_channels"], size, size))


def synthetic_task(inputs: Sequence[InputSpec]) -> Task:
    """The task of a denoiser with seeded weights: DDIM over 1 000 steps, normal noise, normal conditions, null zero.

    Raises:
        TrainingError: if the sample is no image [N, C, H, W].
    """
    from diffusers import DDIMScheduler

    shapes = {spec.name: tuple(int(d) for d in spec.shape[1:]) for spec in inputs}
    latent = shapes["sample"]
    if len(latent) != 3:
        raise TrainingError("sample", f"has shape {list(latent)} a sample; expected (C, H, W)", "Give task=Task(…).")

    def scheduler() -> Any:
        return DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)

    if "condition" not in shapes:
        return Task(scheduler, latent)
    condition = shapes["condition"]
    return Task(
        scheduler,
        latent,
        lambda n, generator: torch.randn(n, *condition, generator=generator),
        lambda n: torch.zeros(n, *condition),
    )


def guided(
    denoise: Denoise, sample: Tensor, timestep: float, conditions: tuple[Tensor, Tensor] | None, g: float
) -> Tensor:
    """ε = ε_u + g·(ε_c - ε_u), both halves in one call; ε(x) itself for an unconditional model.

    sample [N, C, H, W] -> [N, C, H, W]; conditions = (null, wanted), each [N, L, D].
    """
    if conditions is None:
        return denoise(sample, torch.full((len(sample),), timestep), None)
    times = torch.full((2 * len(sample),), timestep)
    null, wanted = denoise(torch.cat([sample, sample]), times, torch.cat(conditions)).chunk(2)
    return null + g * (wanted - null)


def start(task: Task, n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Fresh noise [n, C, H, W] and its conditions (null, drawn)."""
    conditions = None
    if task.draw_conditions is not None and task.unconditional is not None:
        conditions = (task.unconditional(n), task.draw_conditions(n, generator))
    return torch.randn(n, *task.latent_shape, generator=generator), conditions


def advance(
    scheduler: Any, noise: Tensor, timestep: Tensor, sample: Tensor, eta: float, generator: torch.Generator
) -> Tensor:
    """One sampler step x_t -> x_{t-1}; eta and generator go only to schedulers that take them."""
    import inspect

    accepted = inspect.signature(scheduler.step).parameters
    options = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}
    return scheduler.step(noise, timestep, sample, **options).prev_sample  # type: ignore[no-any-return]


@torch.no_grad()
def trajectory(task: Task, denoise: Denoise, n: int, steps: int, g: float, eta: float, seed: int) -> Iterator[Tensor]:
    """Runs the sampler with `denoise` and yields x_t before each step."""
    generator = torch.Generator().manual_seed(seed)
    scheduler = task.new_scheduler()
    scheduler.set_timesteps(steps)
    sample, conditions = start(task, n, generator)
    sample = sample * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        yield sample
        model_input = scheduler.scale_model_input(sample, timestep)
        noise = guided(denoise, model_input, float(timestep), conditions, g)
        sample = advance(scheduler, noise, timestep, sample, eta, generator)
