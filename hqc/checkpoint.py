"""Checkpoints of a long step: a folder of safetensors and JSON, replaced atomically, checked by hash."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hqc.errors import ArtefactError
from hqc.storage import atomic_folder, check_manifest, write_manifest

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

_KIND = "hqc-checkpoint"
_TENSORS = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Where a step stands: updates done, tensors by name (values, moments of AdamW). of: which step of the recipe."""

    step: int
    tensors: Mapping[str, Tensor]
    of: int = 0


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Replaces the checkpoint in `folder`."""
    with atomic_folder(folder, force=True) as temporary:
        save_file(dict(checkpoint.tensors), temporary / _TENSORS)
        write_manifest(temporary, _KIND, {"step": checkpoint.step, "of": checkpoint.of})


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        ArtefactError: if it is missing or damaged.
    """
    manifest = check_manifest(folder, _KIND)
    if _TENSORS not in manifest["files"]:
        raise ArtefactError(str(folder / "manifest.json"), f"lists no {_TENSORS}", "Start again without --resume.")
    try:
        tensors = load_file(folder / _TENSORS)
        if (step := int(manifest["step"])) < 1:
            raise ValueError(f"step {step}")
        of = int(manifest.get("of", 0))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ArtefactError(str(folder), f"cannot be read ({error})", "Start again without --resume.") from error
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise ArtefactError(str(folder), "holds NaN or infinity", "Start again without --resume.")
    return Checkpoint(step, tensors, of)
