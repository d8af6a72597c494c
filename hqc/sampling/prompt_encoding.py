"""What a pipeline's text encoders make of prompts, and what its denoiser is given beside them.

condition               [N, L, D]  the last hidden states; of SDXL two encoders' joined, of SD3 CLIP's before T5's
encoder_attention_mask  [N, L]     PixArt
text_embeds             [N, P]     SDXL's pooled projection; pooled_projections of SD3 and Flux

time_ids                [N, 6]     SDXL's sizes of an uncropped image; [N, 5] of its refiner
resolution, aspect_ratio           PixArt's sizes
timestep_cond, guidance            the guidance scale, of latent consistency models and Flux
class_labels            [N]        the noise level of an upscaler, its pipeline's own default
img_ids, txt_ids                   Flux's places
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hqc.errors import TrainingError
from hqc.program import InputSpec, Program
from hqc.quiet import quiet_libraries
from hqc.sampling.sources import places, time_ids

__all__ = [
    "BESIDE",
    "Encoded",
    "Facts",
    "beside",
    "condition_tokens",
    "cut_prompts",
    "encode",
    "encoded_names",
    "facts_of",
]

_PROMPTS_AT_ONCE = 8
_BERT_TOKENS = 77
# The refiner's aesthetic score, and that of what guidance leads away from: StableDiffusionXLImg2ImgPipeline's own.
_SCORE, _NULL_SCORE = 6.0, 2.5
BESIDE = frozenset(
    ("time_ids", "resolution", "aspect_ratio", "timestep_cond", "guidance", "class_labels", "img_ids", "txt_ids")
)
"""Inputs that do not come from a prompt."""


@dataclass(frozen=True)
class Encoded:
    """By input: all prompts [P, …] and the null condition [1, …], in float32; no null ones where there are none."""

    prompts: Mapping[str, Tensor]
    null: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Layout:
    """Places of what `encode_prompt` gives, by input: of the prompts, and of the null condition."""

    prompts: Mapping[str, int]
    null: Mapping[str, int]


_UNET = _Layout({"condition": 0, "text_embeds": 2}, {"condition": 1, "text_embeds": 3})
_LAYOUTS: Mapping[str, _Layout] = {
    "SD3Transformer2DModel": _Layout(
        {"condition": 0, "pooled_projections": 2}, {"condition": 1, "pooled_projections": 3}
    ),
    "PixArtTransformer2DModel": _Layout(
        {"condition": 0, "encoder_attention_mask": 1}, {"condition": 2, "encoder_attention_mask": 3}
    ),
    "FluxTransformer2DModel": _Layout({"condition": 0, "pooled_projections": 1}, {}),
}


def _layout(kind: str) -> _Layout:
    return _LAYOUTS.get(kind, _UNET)


def encoded_names(kind: str) -> frozenset[str]:
    """The inputs of a denoiser of this class that prompts are encoded into."""
    return frozenset(_layout(kind).prompts)


@torch.no_grad()
def encode(pipeline: Any, program: Program, prompts: Sequence[str], device: torch.device) -> Encoded:
    """The prompts, and the empty one or zeros, as the pipeline's own `encode_prompt` gives them."""
    if not hasattr(pipeline, "encode_prompt"):
        return _encode_with_bert(pipeline, prompts, device)
    layout, kind = _layout(program.origin.kind), type(pipeline)
    taken = inspect.signature(kind.encode_prompt).parameters
    called = inspect.signature(kind.__call__).parameters
    _stand_in(pipeline, program)
    given = {
        "device": device,
        "num_images_per_prompt": 1,
        "max_sequence_length": condition_tokens(pipeline, program.inputs),
        **({"clean_caption": called["clean_caption"].default} if "clean_caption" in called else {}),
        # SD3 has no default for the prompts of its other encoders: None takes the first one's.
        **dict.fromkeys(("prompt_2", "prompt_3")),
    }

    def run(some: Sequence[str], guided: bool) -> tuple[Tensor | None, ...]:
        options = {**given, "do_classifier_free_guidance": guided}
        return tuple(pipeline.encode_prompt(list(some), **{k: v for k, v in options.items() if k in taken}))

    with quiet_libraries():
        pieces = [run(prompts[i : i + _PROMPTS_AT_ONCE], False) for i in range(0, len(prompts), _PROMPTS_AT_ONCE)]
        nulls = run(prompts[:1], True) if layout.null else ()
    count = len(pieces[0])  # two of Stable Diffusion, four of SDXL
    return Encoded(
        {n: torch.cat([_plain(piece[i]) for piece in pieces]) for n, i in layout.prompts.items() if i < count},
        {n: _plain(nulls[i]) for n, i in layout.null.items() if i < len(nulls)},
    )


def _encode_with_bert(pipeline: Any, prompts: Sequence[str], device: torch.device) -> Encoded:
    """As diffusers' text-conditional LDM pipeline does in its call: it has no `encode_prompt`."""

    def run(some: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": _BERT_TOKENS, "truncation": True, "return_tensors": "pt"}
        return _plain(pipeline.bert(pipeline.tokenizer(list(some), **options).input_ids.to(device))[0])

    with quiet_libraries():
        pieces = [run(prompts[i : i + _PROMPTS_AT_ONCE]) for i in range(0, len(prompts), _PROMPTS_AT_ONCE)]
        return Encoded({"condition": torch.cat(pieces)}, {"condition": run([""])})


def _stand_in(pipeline: Any, program: Program) -> None:
    """A denoiser's configuration where the pipeline was loaded without one: SD3 without T5 asks it for a width."""
    if getattr(pipeline, "transformer", pipeline) is None:
        config = SimpleNamespace(**program.origin.unet_config)
        object.__setattr__(pipeline, "transformer", SimpleNamespace(config=config, dtype=torch.float32))


def condition_tokens(pipeline: Any, inputs: Sequence[InputSpec]) -> int | None:
    """How many tokens the pipeline's T5 may give for the condition that was captured; None: there is no condition."""
    length = next((int(spec.shape[1]) for spec in inputs if spec.name == "condition" and len(spec.shape) == 3), None)
    if length is None or not type(pipeline).__name__.startswith("StableDiffusion3"):
        return length
    return max(1, length - int(pipeline.tokenizer_max_length))  # CLIP's tokens stand before those of T5


def cut_prompts(pipeline: Any, prompts: Sequence[str], inputs: Sequence[InputSpec]) -> int:
    """How many prompts are longer than a tokenizer of the pipeline takes."""
    tokens = condition_tokens(pipeline, inputs)
    found = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    with quiet_libraries():
        return sum(any(t is not None and _is_cut(t, prompt, tokens) for t in found) for prompt in prompts)


def _is_cut(tokenizer: Any, prompt: str, tokens: int | None) -> bool:
    limit = int(tokenizer.model_max_length)
    if tokens is not None and type(tokenizer).__name__.startswith("T5"):  # as many as were captured
        limit = min(limit, tokens)
    return len(tokenizer(prompt).input_ids) > limit


def _plain(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.float().cpu()


# ---- what goes beside ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What decides the inputs beside the prompts: pixels, the guidance scale, the noise level of an upscaler.

    latents: their size where they are packed, None for a square.
    embedding: (guidance scale - 1, width) -> the embedding [1, width] that a latent consistency model is given.
    """

    height: float
    width: float
    guidance_scale: float
    noise_level: float | None
    latents: Any | None = None
    embedding: Any | None = None


def facts_of(pipeline: Any, program: Program, guidance_scale: float | None) -> Facts:
    """From the pipeline and the captured sizes; guidance_scale None takes the pipeline's own default."""
    called = inspect.signature(type(pipeline).__call__).parameters
    defaults = {name: called[name].default for name in ("guidance_scale", "noise_level") if name in called}
    height, width = _pixels(pipeline, program)
    scale = defaults.get("guidance_scale", 1.0) if guidance_scale is None else guidance_scale
    return Facts(
        height,
        width,
        float(scale),
        defaults.get("noise_level"),
        program.origin.unet_config.get("sample_size"),
        getattr(pipeline, "get_guidance_scale_embedding", None),
    )


def beside(spec: InputSpec, facts: Facts, *, null: bool) -> Tensor | None:
    """The input of one sample [1, …], or what all share; None in the null condition for that, which serves both halves.

    Raises:
        TrainingError: if the pipeline does not say what it is.
    """
    if not spec.batched:
        return (
            None
            if null
            else (places(spec, facts.latents) if spec.name == "img_ids" else torch.zeros(*map(int, spec.shape)))
        )
    if spec.name == "time_ids":
        return time_ids(spec, 1, facts.height, facts.width, _NULL_SCORE if null else _SCORE)
    if spec.name == "timestep_cond":
        return _guidance_embedding(spec, facts)
    values: Any = {
        "resolution": [facts.height, facts.width],
        "aspect_ratio": [facts.height / max(facts.width, 1.0)],
        "guidance": facts.guidance_scale,
        "class_labels": facts.noise_level,
    }[spec.name]
    if values is None or (spec.name == "class_labels" and len(spec.shape) != 1):
        raise TrainingError(
            spec.name, "is no noise level: the pipeline encodes no prompt into it", "Give --synthetic instead."
        )
    return torch.tensor([values], dtype=getattr(torch, spec.dtype))


def _guidance_embedding(spec: InputSpec, facts: Facts) -> Tensor:
    if facts.embedding is None:
        raise TrainingError(spec.name, "the pipeline has no embedding of a guidance scale", "Give --synthetic instead.")
    embedding: Tensor = facts.embedding(torch.tensor([facts.guidance_scale - 1.0]), embedding_dim=int(spec.shape[1]))
    return embedding.float()


def _pixels(pipeline: Any, program: Program) -> tuple[float, float]:
    """Height and width of the images that the program's latents decode into; 0 where latents are packed."""
    shape = next(spec.shape[1:] for spec in program.inputs if spec.name == "sample")
    if len(shape) != 3:
        return 0.0, 0.0
    scale = getattr(pipeline, "vae_scale_factor", 8)
    return float(int(shape[1]) * scale), float(int(shape[2]) * scale)
