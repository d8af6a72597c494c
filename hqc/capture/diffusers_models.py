"""diffusers folders as sources: a pipeline's denoiser, or the folder of a denoiser by itself."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture.averaged_folders import choose_part, choose_set
from hqc.capture.averages import Weights
from hqc.capture.families import FAMILIES, call_arguments, family_of
from hqc.capture.fit import check_folder, empty_module
from hqc.capture.source import Source, versions
from hqc.configurations import check_configuration
from hqc.errors import CaptureError, HqcError
from hqc.memory import require_memory, stored_parameters, trace_bytes
from hqc.program import InputSpec, Origin
from hqc.quiet import quiet_libraries
from hqc.sizes import LatentSize, as_size

__all__ = [
    "CaptureOptions",
    "Denoiser",
    "DiffusersUNet",
    "denoiser_source",
    "from_folder",
    "from_pipeline",
    "load_denoiser",
    "plain_config",
    "read_class",
    "unet_source",
]

# Configurations of DiT and PixArt-α on the hub still have the class that these were split from.
_LEGACY = ("Transformer2DModel",)


@dataclass(frozen=True)
class CaptureOptions:
    """What a source leaves open: tokens of the condition, size of the latents, which of two sets of weights.

    None takes the model's own, and of raw and averaged weights the averaged ones. variant: of a folder's weights.
    """

    condition_length: int | None = None
    latent_size: LatentSize | None = None
    weights: Weights | None = None
    variant: str | None = None


class Denoiser(nn.Module):
    """A diffusers denoiser as forward(sample, timestep, *conditions) -> tensor, in the order of `names`."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        call = call_arguments(type(self.unet).__name__, dict(zip(self.names, inputs, strict=True)))
        return self.unet(**call, return_dict=False)[0]  # type: ignore[no-any-return]


class DiffusersUNet(nn.Module):
    """diffusers' UNet as forward(sample, timestep[, condition]) -> tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            return self.unet(sample, timestep, return_dict=False)[0]  # type: ignore[no-any-return]
        return self.unet(sample, timestep, encoder_hidden_states=condition, return_dict=False)[0]  # type: ignore[no-any-return]


def from_pipeline(folder: Path, name: str, options: CaptureOptions) -> Source:
    """The denoiser of a pipeline folder, or of a checkpoint of training: its unet/ or transformer/, or the average.

    Raises:
        CaptureError: if it has neither, or what is there cannot be captured.
    """
    part = choose_part(folder, options.weights)
    if part is None:
        raise CaptureError(
            str(folder),
            "the pipeline has no unet/ folder and no transformer/ folder",
            "Give a pipeline with one of them.",
        )
    if options.condition_length not in (None, 1) and (folder / "class_embedder").is_dir():
        raise CaptureError(
            str(folder), "takes no --condition-length: its class embedder gives one token", "Leave it out."
        )
    length = options.condition_length or _condition_length(folder, read_class(folder / part.name))
    options = replace(options, condition_length=length)
    around = folder if (folder / "model_index.json").is_file() else None
    source = from_folder(folder / part.name, name, options, around, strict=not part.said)
    return source if not part.said else replace(source, notes={**source.notes, "weights": part.said})


def _condition_length(folder: Path, kind: str) -> int:
    """Tokens of the condition: the tokenizer's maximum for a UNet with one, one for a class embedder."""
    if kind not in ("UNet2DConditionModel", "UNet2DModel"):
        return family_of(kind).length if kind in FAMILIES else 1
    path = folder / "tokenizer" / "tokenizer_config.json"
    if not path.is_file():
        return 1
    if _pipeline_name(folder).startswith(_FIXED_LENGTH):
        return 77
    try:
        return min(int(json.loads(path.read_text(encoding="utf-8")).get("model_max_length", 77)), 512)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CaptureError(str(path), f"gives no length ({error})", "Check the file.") from error


_FIXED_LENGTH = ("LDMTextToImagePipeline", "IF")
"""Pipelines of diffusers that encode into 77 tokens whatever their tokenizer takes."""


def _pipeline_name(folder: Path) -> str:
    try:
        return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


def from_folder(
    folder: Path, name: str, options: CaptureOptions, pipeline: Path | None, *, strict: bool = True
) -> Source:
    """The denoiser of a folder with config.json and safetensors weights.

    strict: refuse to choose between raw and averaged weights where the folder has one set only.

    Raises:
        CaptureError: if it holds another class, or cannot be loaded or captured.
    """
    kind = read_class(folder)
    if kind not in (*FAMILIES, *_LEGACY):
        raise CaptureError(
            str(folder), f"holds a {kind}; expected {' or '.join(FAMILIES)}", "Give the denoiser's own folder."
        )
    chosen = choose_set(folder, options.weights, options.variant, strict=strict)
    model = load_denoiser(folder, kind, chosen.name or None)
    source = denoiser_source(model, name, options.condition_length, options.latent_size, pipeline)
    notes = {"weights": chosen.said} if chosen.said else {"variant": chosen.name} if chosen.name else {}
    return replace(source, notes=notes)


def read_class(folder: Path) -> str:
    """The class that a folder's config.json names.

    Raises:
        CaptureError: if it cannot be read.
    """
    path = folder / "config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("_class_name"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        found = " ".join(str(error).split())[:150]
        raise CaptureError(str(path), f"is not JSON ({found})", "Check the file.") from error


def load_denoiser(folder: Path, kind: str, variant: str | None = None) -> nn.Module:
    """The module of a folder, in float32; weights are read from safetensors alone.

    Raises:
        CaptureError: if diffusers cannot load it. MemoryShortError: if it does not fit the memory that is free.
    """
    import diffusers

    check_configuration(folder / "config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stem = "diffusion_pytorch_model" + (rf"\.{variant}" if variant else "")
        require_memory(f"tracing {folder}", trace_bytes(stored_parameters(folder, stem), config))
        with quiet_libraries():
            model, found = getattr(diffusers, kind).from_pretrained(
                folder,
                torch_dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                variant=variant,
            )
    except HqcError:
        raise
    except Exception as error:  # whatever a configuration makes diffusers raise
        _check_weights(folder, kind, variant)
        first = " ".join(str(error).split())[:150] or type(error).__name__
        raise CaptureError(str(folder), f"diffusers could not load it ({first})", "Check the folder.") from error
    if found["missing_keys"] or found["unexpected_keys"]:  # diffusers makes up the one and drops the other
        _check_weights(folder, kind, variant)
        names = ", ".join(sorted([*found["missing_keys"], *found["unexpected_keys"]])[:3])
        raise CaptureError(str(folder), f"its weights are not those of its config.json ({names})", "Check the folder.")
    return model  # type: ignore[no-any-return]


def _check_weights(folder: Path, kind: str, variant: str | None) -> None:
    """Says which weights do not fit, where that is what is wrong."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with quiet_libraries():
            module = empty_module(kind, config)
    except Exception:
        return  # the configuration itself is wrong, and diffusers has said how
    check_folder(folder, module, variant)


def denoiser_source(
    model: Any,
    name: str,
    condition_length: int | None = None,
    latent_size: LatentSize | None = None,
    pipeline: Path | None = None,
) -> Source:
    """A loaded diffusers denoiser as a source; `condition_length` tokens where it is conditional.

    Raises:
        CaptureError: for a class without a wrapper, or options of it that hqc has no input for.
    """
    kind = type(model).__name__
    family = family_of(kind)
    inputs: tuple[InputSpec, ...] = family.inputs(model.config, condition_length or family.length, latent_size)
    # What is read from the configuration later, the side of new latents, is what was traced.
    own_size = {} if latent_size is None else {"sample_size": _plain_size(latent_size)}
    origin = Origin(
        source=name,
        kind=kind,
        pipeline=str(pipeline.resolve()) if pipeline is not None and name != "digits" else name if pipeline else "",
        unet_config={**plain_config(model.config), **own_size, "_class_name": kind},
        versions=versions(),
    )
    return Source(Denoiser(model, [spec.name for spec in inputs]), inputs, origin, pipeline, prefix="unet.")


def _plain_size(size: LatentSize) -> int | list[int]:
    """As JSON has it, and diffusers' configurations have it."""
    size = as_size(size)
    return size if isinstance(size, int) else list(size)


def unet_source(unet: Any, name: str, condition_length: int, pipeline: Path | None = None) -> Source:
    """A loaded diffusers UNet as a source; `condition_length` tokens where it is conditional."""
    return denoiser_source(unet, name, condition_length, None, pipeline)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of diffusers as JSON has it, without its private fields."""
    return json.loads(json.dumps({k: v for k, v in dict(config).items() if not k.startswith("_name")}, default=str))  # type: ignore[no-any-return]
