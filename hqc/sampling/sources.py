"""Tasks from what is there: a pipeline's scheduler and conditions, or noise and random conditions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hqc.errors import TrainingError
from hqc.program import InputSpec, Program
from hqc.sampling.one_call import OneCall
from hqc.sampling.task import Condition, Task
from hqc.sizes import sides

__all__ = [
    "NOISE",
    "class_conditional_task",
    "conditions_of",
    "distilled",
    "one_call_task",
    "pipeline_task",
    "places",
    "synthetic_task",
    "task_settings",
    "time_ids",
]

PIPELINE = "the pipeline's conditions"
NOISE = "noise and random conditions, not real ones"

_FLOW = ("SD3Transformer2DModel", "FluxTransformer2DModel")
# Shift of SD3's scheduler; Flux at 1024 pixels has e^1.15 = 3.16.
_FLOW_SHIFT = 3.0


def conditions_of(inputs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """The inputs besides sample and timestep that must be given, in order."""
    return tuple(spec for spec in inputs if spec.name not in ("sample", "timestep") and spec.default is None)


# ---- pipelines -----------------------------------------------------------------------------------------------------


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
            "Give --synthetic, --prompts FILE if it has a text encoder, or task=Task(…) from Python.",
        )
    null_class = embedder.config.num_classes
    config = pipeline.unet.config

    @torch.no_grad()
    def draw(n: int, generator: torch.Generator) -> Tensor:
        return embedder(torch.randint(0, null_class, (n,), generator=generator)).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def null(n: int) -> Tensor:
        return embedder(torch.full((n,), null_class)).float()  # type: ignore[no-any-return]

    kind, scheduler_config = type(pipeline.scheduler), pipeline.scheduler.config
    latent = (config["in_channels"], *sides(config["sample_size"]))
    return Task(lambda: kind.from_config(scheduler_config), latent, draw, null, drawn_from=PIPELINE)


def pipeline_task(pipeline: Any, program: Program) -> Task:
    """The task of any pipeline whose conditions can be drawn: none, classes by number, or a class embedder.

    Raises:
        TrainingError: if the pipeline's conditions are of another kind.
    """
    wanted = conditions_of(program.inputs)
    labels = len(wanted) == 1 and wanted[0].name == "class_labels" and wanted[0].dtype == "int64"
    if getattr(pipeline, "class_embedder", None) is not None or not (labels or not wanted):
        return class_conditional_task(pipeline)
    settings = {**task_settings(pipeline.scheduler, program), "drawn_from": PIPELINE}
    if not wanted:
        return Task(**settings)
    null_class = int((wanted[0].span or (0, 2))[1]) - 1
    return Task(
        **settings,
        draw_conditions=lambda n, generator: torch.randint(0, null_class, (n,), generator=generator),
        unconditional=lambda n: torch.full((n,), null_class),
    )


def task_settings(scheduler: Any, program: Program) -> dict[str, Any]:
    """The fields of `Task` that the scheduler and the denoiser's shapes decide."""
    kind, config = type(scheduler), scheduler.config
    latent = _latent_shape(program.inputs)
    set_timesteps = _flow_timesteps(config, program) if "FlowMatch" in kind.__name__ else None
    return {
        "new_scheduler": lambda: kind.from_config(config),
        "latent_shape": latent,
        "carried": _carried(program, latent),
        "time_scale": 1e-3 if program.origin.kind == "FluxTransformer2DModel" else 1.0,
        **({"set_timesteps": set_timesteps} if set_timesteps is not None else {}),
    }


def _latent_shape(inputs: Sequence[InputSpec]) -> tuple[int, ...]:
    shapes = {spec.name: tuple(int(d) for d in spec.shape[1:]) for spec in inputs if spec.batched}
    if len(shapes.get("sample", ())) not in (2, 3):
        found = list(shapes.get("sample", ()))
        raise TrainingError(
            "sample", f"has shape {found} a sample; expected (C, H, W) or (L, C)", "Give task=Task(…) from Python."
        )
    return shapes["sample"]


def _carried(program: Program, latent: Sequence[int]) -> int:
    """Channels of the sample that the denoiser gives no noise for: 5 of 9 for inpainting, else 0."""
    (result,) = (node.args[0] for node in program.graph.nodes if node.op == "output")
    shape = result.meta.get("shape", ())  # type: ignore[union-attr]
    axis = 0 if len(latent) == 3 else 1
    if len(shape) != len(latent) + 1:
        return 0
    return max(0, latent[axis] - int(shape[axis + 1]))


def _flow_timesteps(config: Mapping[str, Any], program: Program) -> Callable[[Any, int], None]:
    """Flow matching as diffusers' pipelines ask for it: shifted by the number of tokens where the scheduler wants that.

    Flux gives the sigmas itself, evenly from 1 to 1/n.
    """
    latent = _latent_shape(program.inputs)
    patch = int(program.origin.unet_config.get("patch_size") or 1)
    tokens = latent[0] if len(latent) == 2 else latent[1] * latent[2] // patch**2
    shift = {"mu": _dynamic_shift(config, tokens)} if config.get("use_dynamic_shifting") else {}
    own_sigmas = program.origin.kind == "FluxTransformer2DModel" and not config.get("use_flow_sigmas")

    def set_timesteps(scheduler: Any, steps: int) -> None:
        if own_sigmas:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **shift)
        else:
            scheduler.set_timesteps(steps, **shift)

    return set_timesteps


def _dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """μ, linear in the number of tokens between two points: diffusers' pipelines of SD3 and Flux."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(base + (tokens - low) * (top - base) / (high - low))


# ---- noise and random conditions -----------------------------------------------------------------------------------


def synthetic_task(program: Program) -> Task:
    """The task of a denoiser without a pipeline around it: normal noise, random conditions, null conditions zero.

    DDIM over 1 000 steps with a latent-diffusion model's betas, or flow matching for the transformers trained on it.

    Raises:
        TrainingError: if the sample is neither an image [N, C, H, W] nor tokens [N, L, C].
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if not program.has_timestep:
        return one_call_task(program)
    if program.origin.kind in _FLOW:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=_FLOW_SHIFT)
    else:
        scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    settings, wanted = {**task_settings(scheduler, program), "drawn_from": NOISE}, conditions_of(program.inputs)
    size = program.origin.unet_config.get("sample_size")
    if not wanted:
        return Task(**settings)

    def draw(n: int, generator: torch.Generator) -> Condition:
        return _bare(tuple(_drawn(spec, n, generator, size) for spec in wanted))

    def null(n: int) -> Condition:
        return _bare(tuple(_null(spec, n) for spec in wanted))

    if distilled(wanted):
        return Task(**settings, draw_conditions=draw, distilled=True)
    return Task(**settings, draw_conditions=draw, unconditional=null)


def one_call_task(program: Program) -> Task:
    """The task of a program that reads a sample and nothing else: it is called once, on normal noise.

    Raises:
        TrainingError: if the sample is neither an image [N, C, H, W] nor tokens [N, L, C].
    """
    return Task(OneCall, _latent_shape(program.inputs), drawn_from=NOISE)


_DISTILLED = ("guidance", "timestep_cond")


def distilled(inputs: Sequence[InputSpec]) -> bool:
    """Whether an input carries the guidance scale, as of Flux and latent consistency models: there is no null half."""
    return any(spec.name in _DISTILLED for spec in inputs)


def _bare(conditions: tuple[Tensor | None, ...]) -> Condition:
    """A single condition by itself."""
    first = conditions[0]
    return first if len(conditions) == 1 and first is not None else conditions


def _drawn(spec: InputSpec, n: int, generator: torch.Generator, size: int | Sequence[int] | None) -> Tensor:
    if spec.name == "img_ids":
        return places(spec, size)
    known = _FIXED.get(spec.name)
    return spec.example(n, generator) if known is None else known(spec, n)


def _null(spec: InputSpec, n: int) -> Tensor | None:
    """The null condition: zeros; the same sizes and masks as with a condition; the last class."""
    if not spec.batched:
        return None
    known = _FIXED.get(spec.name)
    if known is not None:
        return known(spec, n)
    shape, dtype = (n, *(int(d) for d in spec.shape[1:])), getattr(torch, spec.dtype)
    last = spec.span[1] - 1 if spec.name == "class_labels" and spec.span is not None else 0
    return torch.full(shape, int(last), dtype=dtype)


def places(spec: InputSpec, size: int | Sequence[int] | None) -> Tensor:
    """(0, row, column) of every token of an image, row by row; zeros for more axes.

    size: of the latents, four of which are a token; None for a square.
    """
    tokens, axes = (int(d) for d in spec.shape)
    height, width = (d // 2 for d in sides(size)) if size else [math.isqrt(tokens)] * 2
    if height * width != tokens or axes < 3:
        raise TrainingError(spec.name, f"has {tokens} places, no square image", "Give task=Task(…) from Python.")
    found = torch.zeros(height, width, axes)
    found[..., 1], found[..., 2] = torch.arange(height)[:, None], torch.arange(width)[None]
    return found.reshape(tokens, axes)


def time_ids(spec: InputSpec, n: int, height: float = 1024, width: float = 1024, score: float = 6) -> Tensor:
    """SDXL's sizes of an uncropped image, h, w, top, left, h, w [n, 6]; the refiner's h, w, top, left, score [n, 5]."""
    values = [height, width, 0, 0, *([height, width] if spec.shape[1] == 6 else [score])]
    return torch.tensor(values, dtype=torch.float32).expand(n, -1).contiguous()


def _constant(value: float) -> Callable[[InputSpec, int], Tensor]:
    def build(spec: InputSpec, n: int) -> Tensor:
        shape = [n if isinstance(d, str) else d for d in spec.shape]
        return torch.full(shape, value).to(getattr(torch, spec.dtype))

    return build


_FIXED: Mapping[str, Callable[[InputSpec, int], Tensor]] = {
    "txt_ids": _constant(0.0),
    "time_ids": time_ids,
    "encoder_attention_mask": _constant(1),
    "resolution": _constant(1024.0),
    "aspect_ratio": _constant(1.0),
    "guidance": _constant(3.5),
}
"""Conditions whose random values would mean nothing: the same for all samples."""
