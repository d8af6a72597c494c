"""Scales of the LoRAs that are attached to a denoiser: an input each, one number a row."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hqc.errors import ArtefactError, EvaluationError
from hqc.lite.arrays import Floats
from hqc.styles.record import attached_names, scale_input

__all__ = ["attached_scales", "check_scales", "scale_inputs"]


def attached_scales(manifest: Mapping[str, Any], where: Path) -> dict[str, float]:
    """The LoRAs of an export and what each is scaled by where nobody says, in their order.

    Raises:
        ArtefactError: if the manifest does not say that.
    """
    inputs = {str(spec.get("name")): spec.get("default") for spec in manifest.get("inputs", ())}
    found = {name: inputs[scale_input(name)] for name in attached_names(inputs)}
    for name, scale in found.items():
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ArtefactError(str(where), f"says no scale of the LoRA {name}", "Export the pipeline again.")
    return found


def check_scales(asked: Iterable[tuple[str, float]], attached: Iterable[str]) -> None:
    """Refuses a LoRA that is not there.

    Raises:
        EvaluationError: naming the first.
    """
    known = tuple(attached)
    if unknown := [name for name, _ in asked if name not in known]:
        found = f"is not attached; there are {', '.join(known)}" if known else "is not attached, and none is"
        raise EvaluationError(f"LoRA {unknown[0]}", found, "Attach it with `hqc export --pipeline --lora`.")


def scale_inputs(attached: Mapping[str, float], asked: Iterable[tuple[str, float]], rows: int) -> dict[str, Floats]:
    """The inputs [rows] of one image's calls: what it asks for, else what each LoRA is attached with."""
    scales = {**attached, **dict(asked)}
    return {scale_input(name): np.full(rows, scale, np.float32) for name, scale in scales.items()}
