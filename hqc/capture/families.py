"""What each class of diffusers denoiser takes: its inputs by name, with shapes read from its configuration.

hqc's names are diffusers' own keywords, but for `sample` (hidden_states) and `condition` (encoder_hidden_states);
what diffusers packs into `added_cond_kwargs` is an input like any other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hqc.errors import CaptureError
from hqc.program import BATCH, InputSpec
from hqc.sizes import LatentSize, as_size, sides, size_text

__all__ = ["ADDED", "FAMILIES", "PACKED", "Family", "call_arguments", "family_of", "plain_arguments"]

ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
"""Inputs that diffusers takes inside `added_cond_kwargs`."""

PACKED = ("FluxTransformer2DModel",)
"""Classes whose latents come as tokens, so that no input shows their side."""

_OURS = {"hidden_states": "sample", "encoder_hidden_states": "condition"}
_TIME_STEPS = 1000
# Pixels of the largest side that sizes and crops are drawn up to.
_PIXELS = 1024
_FLUX_PACKING = 2
_FLUX_LATENT = 128


@dataclass(frozen=True)
class Family:
    """A class of denoiser.

    first: its keyword for the sample. order: its positional arguments, by hqc's names. length: tokens of a condition
    where nothing says otherwise. inputs: (config, tokens, latent size or None) -> the inputs in hqc's order.
    """

    first: str
    order: tuple[str, ...]
    length: int
    inputs: Callable[[Any, int, LatentSize | None], tuple[InputSpec, ...]]


def family_of(kind: str) -> Family:
    """The family of a class by its name.

    Raises:
        CaptureError: for a class that hqc has no wrapper for.
    """
    if kind not in FAMILIES:
        raise CaptureError(
            f"denoiser {kind}",
            f"is none that hqc has a wrapper for; expected {', '.join(FAMILIES)}",
            "Wrap it yourself: `module:callable` takes any module with named inputs.",
        )
    return FAMILIES[kind]


def call_arguments(kind: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """hqc's inputs by name as the keyword arguments of diffusers' forward."""
    first = FAMILIES[kind].first
    spelled = {"sample": first, "condition": "encoder_hidden_states"}
    call = {spelled.get(name, name): value for name, value in named.items() if name not in ADDED}
    if added := {name: value for name, value in named.items() if name in ADDED}:
        call["added_cond_kwargs"] = added
    elif kind == "PixArtTransformer2DModel":
        call["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return call


def plain_arguments(kind: str, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a diffusers-style call by hqc's names; absent ones (None, {}) are left out.

    Raises:
        TypeError: for more positional arguments than diffusers takes, or one given twice.
    """
    order = FAMILIES.get(kind, FAMILIES["UNet2DConditionModel"]).order
    if len(positional) > len(order):
        raise TypeError(f"takes {len(order)} positional arguments and was given {len(positional)}")
    named = dict(zip(order, positional, strict=False))
    for name, value in keywords.items():
        ours = _OURS.get(name, name)
        if named.get(ours) is not None and value is not None:
            raise TypeError(f"got {name!r} twice")
        named[ours] = value if value is not None else named.get(ours)
    added = named.pop("added_cond_kwargs", None) or {}
    named |= added
    return {name: value for name, value in named.items() if value is not None and not _empty(value)}


def _empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value


# ---- the inputs of each family -------------------------------------------------------------------------------------


def _image(config: Any, size: LatentSize | None) -> list[InputSpec]:
    """sample [N, C, H, W] and timestep [N]."""
    side = size or config.sample_size
    if side is None:
        raise CaptureError("sample_size", "is not in the model's configuration", "Give --latent-size.")
    height, width = sides(side)
    _check_patches(config, height, width)
    return [InputSpec("sample", (BATCH, config.in_channels, height, width)), InputSpec("timestep", (BATCH,))]


def _check_patches(config: Any, height: int, width: int) -> None:
    """Refuses sides that a transformer's patches do not divide, or with more patches than it has places for."""
    patch, places = config.get("patch_size"), config.get("pos_embed_max_size")
    if not isinstance(patch, int):
        return
    if height % patch or width % patch:
        near = [max(patch, side - side % patch) for side in (height, width)]
        sizes = [size_text(as_size([side + more for side in near])) for more in (0, patch)]
        raise CaptureError(
            f"latents of {height}×{width}",
            f"are not divided by the model's patches of {patch}",
            f"Give for example --latent-size {sizes[0]} or {sizes[1]}.",
        )
    if isinstance(places, int) and max(height, width) > places * patch:
        raise CaptureError(
            f"latents of {height}×{width}",
            f"have more patches a side than the model's {places} places",
            f"Give a --latent-size of at most {places * patch}.",
        )


def _labels(config: Any) -> list[InputSpec]:
    """class_labels of a UNet, if it takes any."""
    kind, count = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind is None:
        return [] if count is None else [InputSpec("class_labels", (BATCH,), "int64", (0, count))]
    if kind == "timestep":
        return [InputSpec("class_labels", (BATCH,), span=(0, _TIME_STEPS))]
    if kind in ("projection", "simple_projection"):
        return [InputSpec("class_labels", (BATCH, config.projection_class_embeddings_input_dim))]
    raise CaptureError("class_embed_type", f"is {kind!r}, which hqc has no input for", "Use `module:callable`.")


def _unet(config: Any, length: int, size: LatentSize | None) -> tuple[InputSpec, ...]:
    image, timestep = _image(config, size)
    _check_levels(config, *(int(d) for d in image.shape[2:]))
    return (image, timestep, *_labels(config))


def _check_levels(config: Any, height: int, width: int) -> None:
    """Refuses sides that the levels do not divide: the unconditional class of diffusers does not find back to them."""
    factor = 2 ** (len(config.block_out_channels) - 1)
    if height % factor or width % factor:
        near = [max(factor, side - side % factor) for side in (height, width)]
        raise CaptureError(
            f"latents of {height}×{width}",
            f"are not divided by {factor}, as the levels of diffusers' UNet2DModel need",
            f"Give for example --latent-size {size_text(as_size(near))}.",
        )


def _conditional_unet(config: Any, length: int, size: LatentSize | None) -> tuple[InputSpec, ...]:
    """sample, timestep, condition [N, L, D]; class labels; text_embeds and time_ids of SDXL; guidance of LCM."""
    specs = [*_image(config, size), InputSpec("condition", (BATCH, length, _condition_width(config))), *_labels(config)]
    if (width := config.get("time_cond_proj_dim")) is not None:
        specs.append(InputSpec("timestep_cond", (BATCH, width)))
    added = config.get("addition_embed_type")
    if added == "text_time":
        ids, text = _text_time(config)
        specs += [InputSpec("text_embeds", (BATCH, text)), InputSpec("time_ids", (BATCH, ids), span=(0, _PIXELS))]
    elif added not in (None, "text"):
        raise CaptureError(
            "addition_embed_type", f"is {added!r}, which hqc has no input for", "Use `module:callable` for this model."
        )
    return tuple(specs)


def _condition_width(config: Any) -> int:
    kind = config.get("encoder_hid_dim_type")
    if kind not in (None, "text_proj"):
        raise CaptureError(
            "encoder_hid_dim_type", f"is {kind!r}, which hqc has no input for", "Use `module:callable` for this model."
        )
    width = config.encoder_hid_dim if config.get("encoder_hid_dim") else config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def _text_time(config: Any) -> tuple[int, int]:
    """Numbers of a sample's time_ids and width of its text_embeds: ids·addition_time_embed_dim + width = projection.

    The base model has six ids (sizes, crops, target), the refiner five (one aesthetic score for the target).
    """
    total, each = int(config.projection_class_embeddings_input_dim), int(config.addition_time_embed_dim)
    ids = 5 if config.get("requires_aesthetics_score") or total - 5 * each == _REFINER_TEXT else 6
    text = total - ids * each
    if text <= 0:
        raise CaptureError(
            "projection_class_embeddings_input_dim",
            f"is {total}, less than {ids} ids of {each}",
            "Check the model's configuration.",
        )
    return ids, text


_REFINER_TEXT = 1280


def _dit(config: Any, length: int, size: LatentSize | None) -> tuple[InputSpec, ...]:
    """sample, timestep, class_labels [N]; the label after the last class is the null class."""
    image, timestep = _image(config, size)
    height, width = (int(d) for d in image.shape[2:])
    if height != width:
        raise CaptureError(
            f"latents of {height}×{width}",
            "are no square, and diffusers' DiTTransformer2DModel puts its patches together as one",
            f"Give one side: --latent-size {height}.",
        )
    return (image, timestep, InputSpec("class_labels", (BATCH,), "int64", (0, config.num_embeds_ada_norm + 1)))


def _pixart(config: Any, length: int, size: LatentSize | None) -> tuple[InputSpec, ...]:
    """sample, timestep, condition [N, L, D] with its mask [N, L]; sizes where it was trained on several."""
    width = config.caption_channels or config.cross_attention_dim
    specs = [
        *_image(config, size),
        InputSpec("condition", (BATCH, length, width)),
        InputSpec("encoder_attention_mask", (BATCH, length), "int64", (0, 2)),
    ]
    if _several_sizes(config):
        specs.append(InputSpec("resolution", (BATCH, 2), span=(0, _PIXELS)))
        specs.append(InputSpec("aspect_ratio", (BATCH, 1), span=(0.25, 4)))
    return tuple(specs)


def _several_sizes(config: Any) -> bool:
    """diffusers' own rule: the model of 1024 pixels, unless the configuration says otherwise."""
    flag = config.get("use_additional_conditions")
    return bool(config.sample_size == 128 if flag is None else flag)


def _sd3(config: Any, length: int, size: LatentSize | None) -> tuple[InputSpec, ...]:
    """sample, timestep in 0…1000, condition [N, L, D], pooled_projections [N, P]."""
    sample, _ = _image(config, size)
    return (
        sample,
        InputSpec("timestep", (BATCH,), span=(0, _TIME_STEPS)),
        InputSpec("condition", (BATCH, length, config.joint_attention_dim)),
        InputSpec("pooled_projections", (BATCH, config.pooled_projection_dim)),
    )


def _flux(config: Any, length: int, size: LatentSize | None) -> tuple[InputSpec, ...]:
    """Packed latents [N, L', C], timestep in 0…1, condition, pooled_projections, the places of all tokens, guidance."""
    height, width = sides(size or _FLUX_LATENT)
    _check_patches({"patch_size": _FLUX_PACKING}, height, width)
    height, width = height // _FLUX_PACKING, width // _FLUX_PACKING
    axes = len(config.axes_dims_rope)
    specs = [
        InputSpec("sample", (BATCH, height * width, config.in_channels)),
        InputSpec("timestep", (BATCH,), span=(0, 1)),
        InputSpec("condition", (BATCH, length, config.joint_attention_dim)),
        InputSpec("pooled_projections", (BATCH, config.pooled_projection_dim)),
        InputSpec("img_ids", (height * width, axes), span=(0, max(height, width))),
        InputSpec("txt_ids", (length, axes), span=(0, 1)),
    ]
    if config.guidance_embeds:
        specs.append(InputSpec("guidance", (BATCH,), span=(1, 10)))
    return tuple(specs)


FAMILIES: Mapping[str, Family] = {
    "UNet2DConditionModel": Family(
        "sample",
        (
            "sample",
            "timestep",
            "condition",
            "class_labels",
            "timestep_cond",
            "attention_mask",
            "cross_attention_kwargs",
            "added_cond_kwargs",
        ),
        77,
        _conditional_unet,
    ),
    "UNet2DModel": Family("sample", ("sample", "timestep", "class_labels"), 1, _unet),
    "DiTTransformer2DModel": Family("hidden_states", ("sample", "timestep", "class_labels"), 1, _dit),
    "PixArtTransformer2DModel": Family(
        "hidden_states",
        (
            "sample",
            "condition",
            "timestep",
            "added_cond_kwargs",
            "cross_attention_kwargs",
            "attention_mask",
            "encoder_attention_mask",
        ),
        120,
        _pixart,
    ),
    # 77 tokens of CLIP and 256 of T5.
    "SD3Transformer2DModel": Family(
        "hidden_states", ("sample", "condition", "pooled_projections", "timestep"), 333, _sd3
    ),
    "FluxTransformer2DModel": Family(
        "hidden_states",
        ("sample", "condition", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance"),
        512,
        _flux,
    ),
}
