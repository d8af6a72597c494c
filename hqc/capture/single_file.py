"""One checkpoint file as a source: the original layout of Stable Diffusion 1 to 3 and Flux, or diffusers' own names.

Raw or averaged weights are chosen here, and what they are called is left to diffusers. No code of a pickle runs.

The shapes come from a diffusers `config.json` (--config), else from what diffusers infers, whose configuration is
fetched from the hub or found in the local cache.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture.architectures import empty_architecture
from hqc.capture.averages import AVERAGED, choose_weights, flat_name
from hqc.capture.diffusers_models import CaptureOptions, denoiser_source
from hqc.capture.families import FAMILIES
from hqc.capture.fit import check_module, empty_module
from hqc.capture.ldm.checkpoint import read_checkpoint
from hqc.capture.ldm.names import unet_name
from hqc.capture.ldm.unet import UNET_PREFIX
from hqc.capture.source import Source
from hqc.configurations import check_configuration
from hqc.errors import CaptureError
from hqc.memory import require_memory, trace_bytes
from hqc.quiet import quiet_libraries

__all__ = ["from_single_file"]

_CONVERSIONS = {
    "UNet2DConditionModel": "convert_ldm_unet_checkpoint",
    "SD3Transformer2DModel": "convert_sd3_transformer_checkpoint_to_diffusers",
    "FluxTransformer2DModel": "convert_flux_transformer_checkpoint_to_diffusers",
}
_READABLE = tuple(_CONVERSIONS)


def from_single_file(path: Path, config: Path | None, options: CaptureOptions) -> Source:
    """The denoiser inside a checkpoint file.

    Raises:
        CaptureError: if it cannot be read, holds no denoiser of the configured class, or its configuration is missing.
        MemoryShortError: if it does not fit the memory that is free.
    """
    tensors = read_checkpoint(path)
    kind = _class_of(tensors, config)
    if config is not None:
        plain, module = _empty(path, kind, config)
        parameters = sum(tensor.numel() for tensor in module.state_dict().values())
        require_memory(f"tracing {path}", trace_bytes(parameters, plain))
        tensors, taken = choose_weights(path, tensors, _names(tensors, module, plain), options.weights)
        _check_weights(path, kind, config, plain, module, tensors)
    else:
        tensors, taken = choose_weights(path, tensors, _names(tensors, None, {}), options.weights)
    with tempfile.TemporaryDirectory() as folder:
        model = _read(path, tensors, kind, _config_folder(config, Path(folder)))
    source = denoiser_source(model, str(path.resolve()), options.condition_length, options.latent_size)
    return replace(source, notes={"weights": taken})


def _names(tensors: Mapping[str, Tensor], module: nn.Module | None, config: Mapping[str, Any]) -> list[str]:
    """What the denoiser's raw tensors are called: as in the file, or where it has averages alone, as they would be."""
    found = [name for name in tensors if name.startswith(UNET_PREFIX)]
    if found or module is None:
        return found
    own = list(module.state_dict())
    if not {flat_name(name) for name in tensors if name.startswith(AVERAGED)} or tensors.keys() & set(own):
        return own
    attended = ["Attn" in block for block in config.get("down_block_types", ())]
    try:
        original = [UNET_PREFIX + unet_name(name, int(config["layers_per_block"]), attended) for name in own]
    except (KeyError, TypeError, ValueError):  # no UNet of the original code
        return own
    return [*original, *own]


def _config_folder(config: Path | None, folder: Path) -> str | None:
    """diffusers takes the folder of a config.json, not the file."""
    if config is None:
        return None
    shutil.copyfile(config, folder / "config.json")
    return str(folder)


def _class_of(tensors: Mapping[str, Tensor], config: Path | None) -> str:
    """The class that the configuration names, or that diffusers infers from the names of the weights."""
    if config is None:
        return _inferred(tensors)[0]
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        found = " ".join(str(error).split())[:150]
        raise CaptureError(str(config), f"is no diffusers configuration ({found})", "Give a config.json.") from error
    if kind not in _READABLE:
        raise CaptureError(
            str(config), f"configures a {kind}; expected {' or '.join(_READABLE)}", "Give the denoiser's config.json."
        )
    check_configuration(config)
    return str(kind)


def _inferred(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """(class, repository of its configuration), from the names and shapes of the tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    shapes = _shapes(tensors)
    kind = str(infer_diffusers_model_type(shapes))
    repository = str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])
    if kind.startswith(("sd3", "flux")):
        return _READABLE[1 if kind.startswith("sd3") else 2], repository
    return _READABLE[0], repository


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without their data."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}


def _empty(path: Path, kind: str, config: Path) -> tuple[dict[str, Any], nn.Module]:
    """The configuration, and its module without weights."""
    options = json.loads(config.read_text(encoding="utf-8"))
    with quiet_libraries():
        try:
            return options, empty_module(kind, options)
        except Exception as error:  # whatever a configuration makes diffusers raise
            raise _misfit(path, kind, error) from error


def _check_weights(
    path: Path, kind: str, config: Path, options: dict[str, Any], module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Refuses weights that are not the configuration's: diffusers drops what it does not know.

    Names are compared as diffusers has them, after its own conversion where the file is in the original layout.
    """
    from diffusers.loaders import single_file_utils

    shapes = _shapes(tensors)
    if not shapes.keys() & module.state_dict().keys():
        try:
            with quiet_libraries():
                shapes = getattr(single_file_utils, _CONVERSIONS[kind])(checkpoint=shapes, config=options)
        except Exception as error:  # diffusers' converters raise whatever a missing name makes them raise
            raise _misfit(path, kind, error) from error
    check_module(path, config, module, shapes)


def _read(path: Path, tensors: Mapping[str, Tensor], kind: str, config: str | None) -> Any:
    import diffusers

    assert kind in FAMILIES
    if config is None and (known := _known_architecture(tensors, kind)) is not None:
        return known
    options = {"config": config, "local_files_only": True} if config is not None else {}
    try:
        with quiet_libraries():
            return getattr(diffusers, kind).from_single_file(dict(tensors), torch_dtype=torch.float32, **options)
    except Exception as error:  # as above
        first = " ".join(str(error).split())[:120] or type(error).__name__
        if config is None:
            repository = _inferred(tensors)[1]
            raise CaptureError(
                str(path),
                f"needs the configuration of {repository}, as far as diffusers can tell ({first})",
                "Give it with --config: config.json of its unet/ or transformer/ folder, or the original YAML.",
            ) from error
        raise _misfit(path, kind, error) from error


def _known_architecture(tensors: Mapping[str, Tensor], kind: str) -> Any | None:
    """A UNet of Stable Diffusion 1 or XL, whose published sizes need no configuration; None where it is none."""
    from diffusers.loaders import single_file_utils

    for name in ("sd15", "sdxl"):
        module: Any = empty_architecture(name)
        if type(module).__name__ != kind:
            continue
        try:
            found = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), dict(module.config))
        except Exception:  # as above
            continue
        wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
        if {key: tensor.shape for key, tensor in found.items()} == wanted:
            module.load_state_dict({key: tensor.float() for key, tensor in found.items()}, assign=True)
            return module.eval().requires_grad_(False)
    return None


def _misfit(path: Path, kind: str, error: Exception) -> CaptureError:
    first = " ".join(str(error).split())[:120] or type(error).__name__
    return CaptureError(
        str(path), f"does not fit the configuration of a {kind} ({first})", "Give the config.json of this file."
    )
