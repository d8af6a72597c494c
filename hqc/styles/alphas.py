"""What a LoRA's product is multiplied by: alpha / rank, alpha from the tensors, or from settings beside them."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hqc.errors import ArtefactError

__all__ = ["Factor", "factor_rule"]

Factor = Callable[[str, int, float | None], float]
"""Of a layer, its rank and its own alpha where the file holds one."""

_LARGEST_JSON = 2**20
_LARGEST_ALPHA = 1e9
_AGAIN = "Save it again from the library that trained it."


def factor_rule(path: Path, metadata: Mapping[str, str]) -> Factor:
    """How this file's products are scaled.

    Settings are those that diffusers puts into the file, or PEFT into `adapter_config.json` beside
    `adapter_model.safetensors`. Without any, and without tensors of alpha, alpha is the rank, as in diffusers.

    Raises:
        ArtefactError: for settings that cannot be read, or that ask for more than a product of low rank.
    """
    settings = _settings(path, metadata)
    if settings.get("use_dora"):
        raise ArtefactError(str(path), "is a DoRA: it also scales the norms of the weights", "Give a plain LoRA.")
    common, own = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    numbers = [*([] if common is None else [common]), *(own.values() if isinstance(own, dict) else [None])]
    if not all(type(number) in (int, float) and abs(number) < _LARGEST_ALPHA for number in numbers):
        raise ArtefactError(str(path), "has settings whose alpha is no number", _AGAIN)
    rooted = bool(settings.get("use_rslora"))

    def factor(layer: str, rank: int, alpha: float | None) -> float:
        if alpha is None:
            alpha = next((v for key, v in own.items() if _names(str(key), layer)), common)
        return 1.0 if alpha is None else float(alpha) / (math.sqrt(rank) if rooted else rank)

    return factor


def _names(key: str, layer: str) -> bool:
    """Whether a key of the settings, which PEFT takes for the end of a name, is this layer's."""
    key = key.removeprefix("^").removesuffix("$").removeprefix("unet.").removeprefix("transformer.")
    return layer == key or layer.endswith(f".{key}")


def _settings(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    text = metadata.get("lora_adapter_metadata", "")
    beside = path.with_name("adapter_config.json")
    try:
        if text:
            return _of_the_denoiser(_parsed(text))
        if path.name == "adapter_model.safetensors" and beside.is_file():
            with beside.open(encoding="utf-8") as file:
                return _mapping(_parsed(file.read(_LARGEST_JSON + 1)))
    except (OSError, ValueError, RecursionError) as error:
        first = " ".join(str(error).split())[:100]
        raise ArtefactError(str(path), f"has settings that cannot be read ({first})", _AGAIN) from error
    return {}


def _parsed(text: str) -> Any:
    if len(text) > _LARGEST_JSON:
        raise ValueError("they are larger than any settings")
    return json.loads(text)


def _mapping(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError("they are no mapping")
    return data


def _of_the_denoiser(data: Any) -> dict[str, Any]:
    """diffusers keeps the settings of all parts in one mapping, `unet.r`, `text_encoder.r`; of one part as they are."""
    found = _mapping(data)
    if "lora_alpha" in found:
        return found
    for prefix in ("unet.", "transformer."):
        if own := {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}:
            return own
    return {}
