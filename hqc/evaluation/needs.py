"""What a pipeline is asked with: a prompt, a class, or nothing; and what its call takes besides.

    prompt        Stable Diffusion 1, 2, 3 and XL, PixArt, Flux, latent consistency models, text-conditional LDM
    class_label   DiT, hqc's class-conditional pipeline, consistency models with classes
    nothing       DDPM, DDIM, unconditional LDM, consistency models without classes

Read from the pipeline's own call, so that a pipeline which diffusers gets later is taken too. Pipelines that start from
an image (inpainting, upscaling, img2img) cannot be asked with words alone and are refused.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from hqc.errors import EvaluationError
from hqc.needs import Kind, Needs
from hqc.sampling.sources import distilled
from hqc.sizes import sides

__all__ = ["call_kind", "denoiser_of", "needs_of"]

_OPTIONS = ("guidance_scale", "eta", "negative_prompt")
_ASKED = ("prompt", "class_labels", "batch_size")
_SAMPLING = ("num_inference_steps", "generator", "output_type", "return_dict")
_IMAGES = ("image", "mask_image", "control_image", "image_embeds", "video")
_DIGIT_CLASSES, _DIGIT_SIZE = 10, (32, 32)
_SQUARE = ("DiTPipeline", "LDMPipeline", "ConsistencyModelPipeline")


def call_kind(pipeline: type, conditions: tuple[str, ...] = ()) -> Kind:
    """What a pipeline of this class is asked with; `conditions` are the denoiser's inputs besides sample and timestep.

    Raises:
        EvaluationError: if it needs what hqc does not give, an image above all.
    """
    parameters = _parameters(pipeline)
    given = (*_ASKED, *_OPTIONS, *_SAMPLING)
    needed = [name for name in _IMAGES if name in parameters]
    needed += [name for name, p in parameters.items() if p.default is p.empty and name not in given]
    if needed:
        raise EvaluationError(
            f"pipeline {pipeline.__name__}",
            f"needs {needed[0]}, which hqc does not give",
            "Run it from Python: set its unet or transformer to hqc.load(…).as_denoiser().",
        )
    if "prompt" in parameters:
        return "prompt"
    labels = parameters.get("class_labels")
    if labels is not None and (labels.default is labels.empty or "class_labels" in conditions):
        return "class_label"
    if conditions:
        raise EvaluationError(
            f"pipeline {pipeline.__name__}",
            f"gives its denoiser no {conditions[0]}, which this one was captured with",
            "Sample it in a pipeline of your own, with hqc.load(…).as_denoiser().",
        )
    return "nothing"


def needs_of(pipe: Any) -> Needs:
    """What a loaded pipeline is asked with.

    Raises:
        EvaluationError: see `call_kind`.
    """
    denoiser = denoiser_of(pipe)
    inputs = {spec.name: spec for spec in getattr(denoiser, "inputs", ())}
    conditions = tuple(name for name in inputs if name not in ("sample", "timestep"))
    kind = call_kind(type(pipe), conditions)
    parameters = _parameters(type(pipe))
    guided_inside = distilled(tuple(inputs.values()))
    classes = _classes(pipe, inputs) if kind == "class_label" else 0
    size = _size(pipe, denoiser)
    if size[0] != size[1] and type(pipe).__name__ in _SQUARE:
        raise EvaluationError(
            f"pipeline {type(pipe).__name__}",
            f"draws squares, and the denoiser was captured for {size[0]}x{size[1]}",
            "Sample it in a pipeline of your own, with hqc.load(…).as_denoiser().",
        )
    return Needs(
        type(pipe).__name__,
        kind,
        classes,
        frozenset(
            name for name in _OPTIONS if name in parameters and not (guided_inside and name == "negative_prompt")
        ),
        size,
        distilled=guided_inside,
        digits=classes == _DIGIT_CLASSES and size == _DIGIT_SIZE and _draws_grey(pipe),
        counts="batch_size" in parameters,
        own_guidance=_own_guidance(parameters),
    )


def denoiser_of(pipe: Any) -> Any:
    """The pipeline's unet or transformer."""
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def _parameters(pipeline: type) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(pipeline.__call__).parameters)
    found.pop("self", None)
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _own_guidance(parameters: Mapping[str, inspect.Parameter]) -> float | None:
    """The default of a pipeline's call; None without one, or where it is no number."""
    found = getattr(parameters.get("guidance_scale"), "default", None)
    return float(found) if isinstance(found, (int, float)) else None


def _classes(pipe: Any, inputs: Mapping[str, Any]) -> int:
    """How many classes can be asked for: the null class of guidance is none of them."""
    if getattr(pipe, "class_embedder", None) is not None:
        return int(pipe.class_embedder.config.num_classes)
    config = denoiser_of(pipe).config
    known = (config.get(name) for name in ("num_embeds_ada_norm", "num_class_embeds"))
    count = next((int(n) for n in known if n), None)
    return count if count is not None else int(inputs["class_labels"].span[1])


def _draws_grey(pipe: Any) -> bool:
    """Whether hqc's class-conditional pipeline gives images of one channel."""
    embedder = getattr(pipe, "class_embedder", None)
    return embedder is not None and getattr(pipe.vae.config, "out_channels", None) == 1


def _size(pipe: Any, denoiser: Any) -> tuple[int, int]:
    """Width and height of the images, px: the denoiser's latents times what the autoencoder enlarges them by."""
    height, width = _latent_size(denoiser)
    scale = _enlargement(pipe)
    return width * scale, height * scale


def _latent_size(denoiser: Any) -> tuple[int, int]:
    shape: tuple[int | str, ...] = next(
        (spec.shape[1:] for spec in getattr(denoiser, "inputs", ()) if spec.name == "sample"), ()
    )
    if len(shape) == 3:
        return int(shape[1]), int(shape[2])
    if len(shape) == 2 and not getattr(denoiser.config, "sample_size", None):  # packed, four latents a token
        return sides(2 * math.isqrt(int(shape[0])))
    return sides(denoiser.config.sample_size)


def _enlargement(pipe: Any) -> int:
    """Pixels of a latent's side."""
    if (factor := getattr(pipe, "vae_scale_factor", None)) is not None:
        return int(factor)
    autoencoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    return 1 if autoencoder is None else int(2 ** (len(autoencoder.config.block_out_channels) - 1))
