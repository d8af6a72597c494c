"""An original checkpoint as a source: the denoiser, and the pipeline around it in diffusers layout."""

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from hqc.capture.averages import choose_weights
from hqc.capture.diffusers_models import CaptureOptions, denoiser_source
from hqc.capture.finite import require_finite
from hqc.capture.ldm.checkpoint import read_checkpoint
from hqc.capture.ldm.config import LdmConfig, read_config
from hqc.capture.ldm.first_stage import build_embedder, build_scheduler, build_vae, embedder_pieces, vae_pieces
from hqc.capture.ldm.unet import build_unet, fill, unet_pieces
from hqc.capture.matching import Piece, check_fit
from hqc.capture.source import Source
from hqc.errors import ArtefactError, CaptureError
from hqc.memory import require_memory, trace_bytes

__all__ = ["from_checkpoint"]

_SCHEDULE_TOLERANCE = 5e-3  # ᾱ in 0…1; weights may be stored in bfloat16
_AROUND = ("cond_stage_model.", "first_stage_model.")
_TEXT_TOKENS = 77  # of CLIP
Parts = dict[str, tuple[nn.Module, dict[str, Piece]]]


def from_checkpoint(path: Path, config_path: Path, options: CaptureOptions) -> Source:
    """An original latent-diffusion checkpoint with its configuration as a source.

    The averaged weights (`model_ema.`) are taken where the checkpoint has them, unless the options ask for the raw
    ones. `pipeline` is a temporary folder with autoencoder, scheduler and class embedder, which lives as long as the
    source: save the program while you hold it.

    Raises:
        CaptureError: if either file cannot be read or they do not fit each other.
        MemoryShortError: if the model does not fit the memory that is free.
    """
    config = read_config(config_path)
    tensors = read_checkpoint(path)
    if config.text:  # the text encoder and the autoencoder stay in the file
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(_AROUND)}
        unet = build_unet(config.unet)
        parts: Parts = {"unet": (unet, unet_pieces(unet, config.unet))}
    else:
        parts = _parts(config, _scale_factor(path, config, tensors))
    unet, unet_from = parts["unet"]
    tensors, taken = choose_weights(path, tensors, [piece.key for piece in unet_from.values()], options.weights)
    check_fit(path, config_path, [piece for _, pieces in parts.values() for piece in pieces.values()], tensors)
    if not config.text:
        _check_schedule(path, config_path, config, tensors)
    parameters = sum(parameter.numel() for module, _ in parts.values() for parameter in module.parameters())
    model: Any = unet
    require_memory(f"tracing {path}", trace_bytes(parameters, model.config))
    for module, pieces in parts.values():
        fill(module, pieces, tensors)
        used = {piece.key: tensors[piece.key] for piece in pieces.values()}
        require_finite(str(path), used, used)
    notes = {"weights": taken, "config": str(config_path)}
    if config.text:
        length = options.condition_length or _TEXT_TOKENS
        source = denoiser_source(unet, str(path.resolve()), length, options.latent_size)
        return replace(source, notes={**notes, "pipeline": "none: text encoder and autoencoder stay in the file"})
    folder = _write_pipeline(parts, config)
    length = 1 if config.classes is not None else 0
    source = denoiser_source(unet, str(path.resolve()), length, options.latent_size)
    source = replace(source, pipeline=folder, notes=notes)
    weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
    return source


def _parts(config: LdmConfig, scale_factor: float) -> Parts:
    """Every module, without weights yet, and the tensors that fill it."""
    unet, vae = build_unet(config.unet), build_vae(config, scale_factor)
    levels = len(config.first_stage_config.params.ddconfig.ch_mult)
    parts = {"unet": (unet, unet_pieces(unet, config.unet)), "vae": (vae, vae_pieces(vae, levels))}
    if config.classes is not None:
        embedder = build_embedder(config.classes)
        parts["class_embedder"] = (embedder, embedder_pieces(embedder))
    return parts


def _scale_factor(path: Path, config: LdmConfig, tensors: Mapping[str, Tensor]) -> float:
    """What latents are multiplied with: measured during training with `scale_by_std`, else the configuration's."""
    if not config.scale_by_std:
        return config.scale_factor
    measured = tensors.get("scale_factor")
    if measured is None or measured.numel() != 1 or not float(measured) > 0:
        raise CaptureError(
            str(path), "has no scale_factor, which scale_by_std asks for", "Give the checkpoint's own configuration."
        )
    return float(measured)


def _check_schedule(path: Path, config_path: Path, config: LdmConfig, tensors: Mapping[str, Tensor]) -> None:
    """The schedule that the checkpoint keeps must be the configuration's."""
    saved, wanted = tensors.get("alphas_cumprod"), build_scheduler(config).alphas_cumprod
    if saved is None:
        return
    if saved.numel() != wanted.numel():
        found = f"{saved.numel()} timesteps; {config_path} has {wanted.numel()}"
    elif not (error := float((saved.reshape(-1).float() - wanted).abs().max())) < _SCHEDULE_TOLERANCE:
        found = f"a noise schedule whose ᾱ differs from that of {config_path} by {error:.2g}"
    else:
        return
    raise CaptureError(str(path), f"has {found}", "Give its own configuration: timesteps, linear_start and linear_end.")


def _write_pipeline(parts: Parts, config: LdmConfig) -> Path:
    """The pipeline's folder without its denoiser, whose weights belong to the Program."""
    import diffusers

    from hqc.models import ldm

    kind = ldm.UnconditionalLDMPipeline if config.classes is None else ldm.ClassConditionalLDMPipeline
    index: dict[str, Any] = {"_class_name": kind.__name__, "_diffusers_version": diffusers.__version__}
    folder = Path(tempfile.mkdtemp(prefix="hqc-pipeline-"))
    try:
        components: dict[str, Any] = {name: module for name, (module, _) in parts.items()}
        components["scheduler"] = build_scheduler(config)
        for name, component in components.items():
            library = "hqc.models.ldm" if type(component).__module__ == "hqc.models.ldm" else "diffusers"
            index[name] = [library, type(component).__name__]
            if name != "unet":
                component.save_pretrained(folder / name)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ArtefactError(str(folder), f"could not be written ({error})", "Free some space in TMPDIR.") from error
    return folder
