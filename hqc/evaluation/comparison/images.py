"""What the sampling of one model keeps: its images and latents, and how it follows the float model.

NAME/images.safetensors     images and latents, and those at gain 1
NAME/samples.json           labels, seeds, protocol; gain and cosine by timestep
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from hqc.evaluation.sampling import Samples, SamplingProtocol
from hqc.storage import atomic_folder, write_manifest

__all__ = ["IMAGES_KIND", "Drawn", "load_drawn", "save_drawn"]

IMAGES_KIND = "hqc-images"
_TENSORS, _REST = "images.safetensors", "samples.json"


@dataclass(frozen=True)
class Drawn:
    """Images of a model; of a quantised one also those at gain 1, where there are any, and its trajectory's figures."""

    samples: Samples
    at_gain_1: Samples | None = None
    trajectory: Mapping[str, Any] | None = None


def save_drawn(drawn: Drawn, folder: Path) -> None:
    """Writes them, whole or not at all."""
    samples, more = drawn.samples, drawn.at_gain_1
    tensors = {"images": samples.images, "latents": samples.latents}
    if more is not None:
        tensors |= {"gain_1": more.images, "gain_1_latents": more.latents}
    rest = {
        "labels": samples.labels,
        "seeds": samples.seeds,
        "protocol": asdict(samples.protocol),
        "prompts": samples.prompts,
        "labelled": samples.labelled,
        "trajectory": drawn.trajectory,
    }
    with atomic_folder(folder, force=True) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, temporary / _TENSORS)
        (temporary / _REST).write_text(json.dumps(rest, indent=1) + "\n", encoding="utf-8")
        write_manifest(temporary, IMAGES_KIND, {})


def load_drawn(folder: Path) -> Drawn:
    """Reads what `save_drawn` wrote."""
    tensors = load_file(folder / _TENSORS)
    rest = json.loads((folder / _REST).read_text(encoding="utf-8"))
    samples = Samples(
        tensors["images"],
        tensors.get("latents"),
        tuple(rest["labels"]),
        tuple(rest["seeds"]),
        SamplingProtocol(**rest["protocol"]),
        tuple(rest["prompts"]),
        rest["labelled"],
    )
    gain_1 = tensors.get("gain_1")
    more = None if gain_1 is None else replace(samples, images=gain_1, latents=tensors.get("gain_1_latents"))
    return Drawn(samples, more, rest["trajectory"])
