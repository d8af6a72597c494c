"""Raw weights or their moving average in folders of diffusers: the average, unless the raw ones are asked for.

unet/  beside  unet_ema/                              as diffusers' training scripts write a checkpoint
diffusion_pytorch_model.safetensors                   averaged, where there is also
diffusion_pytorch_model.non_ema.safetensors           the raw ones
diffusion_pytorch_model.ema.safetensors               averaged, where the raw ones have the plain name
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hqc.capture.averages import Weights
from hqc.capture.fit import choose_variant, variants
from hqc.errors import CaptureError

__all__ = ["PARTS", "Chosen", "choose_part", "choose_set"]

PARTS = ("unet", "transformer")
_AVERAGED = "_ema"
_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Chosen:
    """What was taken of two sets; `said` is its name, empty where there are raw ones only."""

    name: str
    said: str = ""


def choose_part(folder: Path, wanted: Weights | None) -> Chosen | None:
    """The denoiser's folder inside a pipeline, or inside a checkpoint of training; None where there is none.

    Raises:
        CaptureError: if raw weights are asked for and the averaged ones are alone.
    """
    for part in PARTS:
        raw, averaged = ((folder / name / "config.json").is_file() for name in (part, part + _AVERAGED))
        if averaged and not raw and wanted == "raw":
            raise CaptureError(
                str(folder), f"has averaged weights alone ({part}{_AVERAGED})", "Leave --weights raw out."
            )
        if averaged:
            name = part if wanted == "raw" else part + _AVERAGED
            return Chosen(name, name)
        if raw:
            return Chosen(part)
    return None


def choose_set(folder: Path, wanted: Weights | None, variant: str | None, *, strict: bool = True) -> Chosen:
    """The variant of a denoiser's folder to read, empty for the weights without a name.

    strict: refuse a `wanted` where the folder has one set only.

    Raises:
        CaptureError: if the set that is asked for is not there; see `choose_variant`.
    """
    sets = _sets(variants(folder))
    if wanted is not None and sets is None and strict:
        raise CaptureError(
            str(folder), "has one set of weights, not raw and averaged ones", f"Leave --weights {wanted} out."
        )
    if sets is None or variant is not None:
        if wanted is not None and strict:
            raise CaptureError("--weights", f"and --variant {variant} exclude each other", "Give one of them.")
        return Chosen(choose_variant(folder, variant) or "")
    raw, averaged = sets
    name = raw if wanted == "raw" else averaged
    return Chosen(name, f"{_STEM}.{name}" if name else _STEM)


def _sets(found: Collection[str | None]) -> tuple[str, str] | None:
    """The variants of the raw and of the averaged weights, None where a folder has not both."""
    if None in found and "non_ema" in found:
        return "non_ema", ""
    if None in found and "ema" in found:
        return "", "ema"
    return ("non_ema", "ema") if {"ema", "non_ema"} <= set(found) else None
