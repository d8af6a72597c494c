"""What is sampled while calibrating and training: scheduler, latents, conditions; and how guidance combines."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hqc.errors import TrainingError
from hqc.running import run_module
from hqc.sampling.one_call import OneCall

__all__ = [
    "TORCH_GENERATOR",
    "Condition",
    "Conditions",
    "Denoise",
    "Task",
    "call_arguments",
    "called_once",
    "denoiser",
    "guided",
    "guides",
    "noise_only",
    "require_steps",
    "trajectory",
    "why_not_steps",
]

TORCH_GENERATOR = threading.Lock()
"""Is held while torch's global generator is in a state that is not the process's own."""

Denoise = Callable[..., Tensor]
"""(sample [N, …], timestep [N], *conditions in the order of the program's inputs) -> noise [N, …].

A model without conditions is given a single None.
"""

Condition = Tensor | tuple[Tensor | None, ...]
"""One condition [N, …], or several in the order of the program's inputs."""

Conditions = tuple[Condition | None, Condition]
"""What guidance combines: (null, wanted)."""


def _refused_steps(scheduler: Any, steps: int, error: Exception) -> TrainingError:
    """A scheduler's own refusal in one line."""
    said = " ".join(str(error).split())[:120] or type(error).__name__
    trained = getattr(scheduler, "config", {}).get("num_train_timesteps")
    return TrainingError(
        f"--num-inference-steps {steps}",
        f"{type(scheduler).__name__} cannot take them ({said})",
        f"Give fewer steps{f'; it was trained on {trained}' if trained else ''}.",
    )


def require_steps(scheduler: Any, steps: int) -> None:
    """Refuses a number of steps that a diffusers scheduler cannot take, before anything is sampled.

    Its first step is tried on zeros: it has the largest timestep, where tables end.

    Raises:
        TrainingError: with the scheduler's own words.
    """
    if not hasattr(scheduler, "set_timesteps"):
        return
    tried = type(scheduler).from_config(scheduler.config)
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}  # any: it moves timesteps, not counts
    x = torch.zeros(1, 1, 8, 8)
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
    noise = torch.zeros(1, 2, 8, 8) if learned else x
    try:
        with TORCH_GENERATOR, torch.random.fork_rng(devices=[]):
            tried.set_timesteps(steps, **shift)
            if hasattr(tried, "scale_model_input"):
                tried.scale_model_input(x, tried.timesteps[0])
            tried.step(noise, tried.timesteps[0], x)
    except Exception as error:  # as above
        raise _refused_steps(scheduler, steps, error) from error


def why_not_steps(scheduler: Any, steps: int) -> str | None:
    """What `require_steps` says of a number of steps, and what to do; None where it is taken."""
    try:
        require_steps(scheduler, steps)
    except TrainingError as error:
        return f"{error.found}. {error.do}"
    return None


def _set_timesteps(scheduler: Any, steps: int) -> None:
    scheduler.set_timesteps(steps)


@dataclass(frozen=True)
class Task:
    """How to draw what the denoiser is run on.

    new_scheduler: a fresh diffusers scheduler. latent_shape: (C, H, W), or (L, C) for packed tokens.
    draw_conditions: (n, generator) -> conditions [n, …] in the order of the program's inputs (a tensor where there is
    one), or None for an unconditional model. unconditional: n -> the null conditions of guidance, in the same order;
    None in place of one that has no batch axis and serves both halves.
    distilled: conditions, but no null ones: guidance is an input of the model, and it is run once.
    guidance_input: the guidance scale that a distilled model is given; None where it is drawn.
    carried: trailing channels of the latents that are an input and not sampled (mask and masked image of inpainting).
    time_scale: what the denoiser is given for a scheduler's timestep t is time_scale·t (Flux takes t/1000).
    set_timesteps: (scheduler, steps), for schedulers that need more than the number of steps.
    drawn_from: what the conditions are drawn from, for reports and to tell one run from another.
    draw_sample: (n, generator) -> x_T [n, …] itself, where it is not noise: latents of images to be restored, images.
    """

    new_scheduler: Callable[[], Any]
    latent_shape: tuple[int, ...]
    draw_conditions: Callable[[int, torch.Generator], Condition] | None = None
    unconditional: Callable[[int], Condition] | None = None
    distilled: bool = False
    guidance_input: float | None = None
    carried: int = 0
    time_scale: float = 1.0
    set_timesteps: Callable[[Any, int], None] = _set_timesteps
    drawn_from: str = ""
    draw_sample: Callable[[int, torch.Generator], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.distilled and self.draw_conditions is not None and self.unconditional is None:
            return
        if (self.draw_conditions is None) != (self.unconditional is None):
            has, lacks = ("draw_conditions", "unconditional")[:: -1 if self.draw_conditions is None else 1]
            raise TrainingError("Task", f"has {has} without {lacks}", "Give both, or neither for an unconditional one.")

    def doubles(self, g: float) -> bool:
        """Whether a call of the denoiser runs both halves of guidance."""
        return self.unconditional is not None and guides(g)

    def scheduler(self, num_inference_steps: int) -> Any:
        """A fresh scheduler with its timesteps set.

        Raises:
            TrainingError: if it refuses so many steps.
        """
        scheduler = self.new_scheduler()
        try:
            self.set_timesteps(scheduler, num_inference_steps)
        except Exception as error:  # schedulers say in many ways that they cannot
            raise _refused_steps(scheduler, num_inference_steps, error) from error
        return scheduler

    def timesteps(self, num_inference_steps: int) -> tuple[float, ...]:
        """The timesteps that the denoiser is given: the grid of the scale tables, ascending."""
        times = self.scheduler(num_inference_steps).timesteps
        return tuple(sorted({float(t) * self.time_scale for t in times}))


def called_once(task: Task, timestep: float | None) -> Task:
    """The task of a model that is called once at a timestep; the task itself without one, or if it is so already.

    Raises:
        TrainingError: if the model was not trained on that timestep.
    """
    around = task.new_scheduler()
    if timestep is None or isinstance(around, OneCall):
        return task
    levels = getattr(around, "alphas_cumprod", None)
    if levels is not None and round(timestep) >= len(levels):
        found = f"the model was trained on timesteps 0…{len(levels) - 1}"
        raise TrainingError(f"sampler.timestep {timestep:g}", found, f"Give --set sampler.timestep={len(levels) - 1}.")
    return replace(task, new_scheduler=lambda: OneCall(timestep, around), set_timesteps=_set_timesteps)


def guides(g: float) -> bool:
    """Whether a guidance scale asks for guidance: as in diffusers, 1 and less is the condition alone."""
    return g > 1


def denoiser(module: nn.Module) -> Denoise:
    """A program's module as a `Denoise`: without the None that an unconditional model is given.

    A module without a timestep is not given one. It raises what `run_module` does.
    """
    timed = takes_timestep(module)

    def denoise(sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        return run_module(module, *call_arguments(sample, timestep, conditions, timed=timed))

    return denoise


def takes_timestep(module: nn.Module) -> bool:
    """Whether a module is given a timestep; of one without a graph it is not known, and it is."""
    graph = getattr(module, "graph", None)
    return graph is None or any(node.op == "placeholder" and node.name == "timestep" for node in graph.nodes)


def call_arguments(
    sample: Tensor, timestep: Tensor, conditions: Sequence[Tensor | None], *, timed: bool
) -> tuple[Tensor, ...]:
    """The arguments of a program's graph, in its order: what it does not have is left out."""
    return (sample, *((timestep,) if timed else ()), *(c for c in conditions if c is not None))


def guided(
    denoise: Denoise, sample: Tensor, timestep: float | Tensor, conditions: Conditions | None, g: float
) -> Tensor:
    """ε = ε_u + g·(ε_c - ε_u), both halves in one call; ε_c alone for g ≤ 1 and where there is no null condition.

    sample [N, …] -> [N, …]; timestep of all samples, or [N]; conditions = (null, wanted).
    Of a model that predicts a variance too, only ε is returned.
    """
    null, wanted = conditions if conditions is not None else (None, (None,))
    times = timestep if isinstance(timestep, Tensor) else torch.full((len(sample),), timestep)
    if null is None or not guides(g):
        return noise_only(denoise(sample, times, *_each(wanted)), sample)
    times = torch.cat([times, times])
    both = [b if a is None or b is None else torch.cat([a, b]) for a, b in zip(_each(null), _each(wanted), strict=True)]
    without, with_condition = denoise(torch.cat([sample, sample]), times, *both).chunk(2)
    return noise_only(without + g * (with_condition - without), sample)


def _each(condition: Condition) -> tuple[Tensor | None, ...]:
    return condition if isinstance(condition, tuple) else (condition,)


def _channel_axis(tensor: Tensor) -> int:
    """Images [N, C, H, W]; tokens [N, L, C]."""
    return 1 if tensor.ndim >= 4 else -1


def noise_only(found: Tensor, sample: Tensor) -> Tensor:
    """A denoiser's output without the variance that some predict behind it; a view."""
    axis = _channel_axis(sample)
    places = [[d for i, d in enumerate(x.shape) if i != axis % x.ndim] for x in (found, sample)]
    if found.ndim != sample.ndim or found.shape[axis] != 2 * sample.shape[axis] or places[0] != places[1]:
        return found
    return found.narrow(axis, 0, sample.shape[axis])


def start(task: Task, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions | None]:
    """Fresh noise [n, …], or what the task draws instead, and its conditions (null, drawn)."""
    conditions: Conditions | None = None
    if task.draw_conditions is not None:
        null = task.unconditional(n) if task.unconditional is not None else None
        conditions = (null, task.draw_conditions(n, generator))
    if task.draw_sample is not None:
        return task.draw_sample(n, generator), conditions
    return torch.randn(n, *task.latent_shape, generator=generator), conditions


def initial_sample(task: Task, scheduler: Any, noise: Tensor) -> Tensor:
    """x_T from unit noise; flow-matching schedulers have no scale of their own, and what is drawn itself needs none."""
    if task.draw_sample is not None:
        return noise
    return _on_sampled(task, noise, lambda x: x * getattr(scheduler, "init_noise_sigma", 1.0))


def scaled_input(task: Task, scheduler: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    """What the denoiser is given for x_t."""
    if not hasattr(scheduler, "scale_model_input"):
        return sample
    return _on_sampled(task, sample, lambda x: scheduler.scale_model_input(x, timestep))


def _on_sampled(task: Task, sample: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The function of the channels that are sampled, with the carried ones behind them."""
    if not task.carried:
        return function(sample)
    axis = _channel_axis(sample)
    count = sample.shape[axis] - task.carried
    rest = sample.narrow(axis, count, task.carried)
    return torch.cat([function(sample.narrow(axis, 0, count)), rest], axis)


def advance(
    scheduler: Any, noise: Tensor, timestep: Tensor, sample: Tensor, eta: float, generator: torch.Generator
) -> Tensor:
    """One sampler step x_t -> x_{t-1}; eta and generator go only to schedulers that take them.

    Channels of the sample beyond the noise's are carried along. After the one call of `OneCall` nothing is made.
    """
    import inspect

    if isinstance(scheduler, OneCall):
        return sample
    axis = _channel_axis(sample)
    count = noise.shape[axis] if noise.ndim == sample.ndim else sample.shape[axis]
    carried = sample.shape[axis] - count
    accepted = inspect.signature(scheduler.step).parameters
    options = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}

    def step(x: Tensor) -> Tensor:
        try:
            found: Tensor = scheduler.step(noise, timestep, x, **options).prev_sample
        except Exception as error:  # schedulers say in many ways that they cannot
            raise _refused_steps(scheduler, len(scheduler.timesteps), error) from error
        return _stepped(found, scheduler, timestep)

    _require_finite(
        noise, scheduler, timestep, "the denoiser gives", "Its inputs are finite: its weights are not, or it overflows."
    )
    if carried <= 0:
        return step(sample)
    return torch.cat([step(sample.narrow(axis, 0, count)), sample.narrow(axis, count, carried)], axis)


def _stepped(sample: Tensor, scheduler: Any, timestep: Tensor) -> Tensor:
    """What a scheduler made of a finite noise, refused where it is not finite."""
    _require_finite(
        sample,
        scheduler,
        timestep,
        "the scheduler makes",
        "The denoiser's noise is finite: check prediction_type and rescale_betas_zero_snr of the scheduler.",
    )
    return sample


def _require_finite(found: Tensor, scheduler: Any, timestep: Tensor, who: str, do: str) -> None:
    if bool(found.isfinite().all()):
        return
    times = [float(t) for t in scheduler.timesteps]
    step = times.index(float(timestep)) + 1 if float(timestep) in times else "?"
    where = f"sampling with {type(scheduler).__name__}, step {step} of {len(times)} (timestep {float(timestep):g})"
    raise TrainingError(where, f"{who} NaN or infinity", do)


@torch.no_grad()
def trajectory(task: Task, denoise: Denoise, n: int, steps: int, g: float, eta: float, seed: int) -> Iterator[Tensor]:
    """Runs the sampler with `denoise` and yields x_t before each step."""
    generator = torch.Generator().manual_seed(seed)
    scheduler = task.scheduler(steps)
    noise, conditions = start(task, n, generator)
    sample = initial_sample(task, scheduler, noise)
    for timestep in scheduler.timesteps:
        yield sample
        model_input = scaled_input(task, scheduler, sample, timestep)
        noise = guided(denoise, model_input, float(timestep) * task.time_scale, conditions, g)
        sample = advance(scheduler, noise, timestep, sample, eta, generator)
