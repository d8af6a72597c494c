"""Named architectures as sources: the published sizes with seeded weights, for benchmarks without a download.

weights   normal, σ = 1/√fan_in;  biases normal, σ = 0.02;  norms 1 + 0.1·normal
outliers  one channel in 64 of every norm carries 8…32 times its weight: heavy-tailed activations behind it
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from hqc.capture.diffusers_models import unet_source
from hqc.capture.source import Source
from hqc.errors import CaptureError

__all__ = ["ARCHITECTURE", "ARCHITECTURES", "build_architecture", "from_architecture"]

ARCHITECTURE = "arch:"
OUTLIER_EVERY = 64


@dataclass(frozen=True)
class Architecture:
    """A model by name: its diffusers class and options, and the tokens of its condition."""

    kind: str
    options: Mapping[str, Any]
    condition_length: int = 1


ARCHITECTURES: Mapping[str, Architecture] = {
    "ldm4-imagenet": Architecture(
        "UNet2DConditionModel",
        {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (192, 384, 576, 960),
            "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
            "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
            "cross_attention_dim": 512,
            # diffusers reads attention_head_dim as the number of heads here; each head has 32 channels.
            "attention_head_dim": (6, 12, 18, 30),
        },
    ),
    "sd15": Architecture("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}, 77),
}


def from_architecture(source: str, *, condition_length: int | None = None, outliers: bool = False) -> Source:
    """`arch:NAME` as a source.

    Raises:
        CaptureError: for a name that is not among `ARCHITECTURES`.
    """
    name = source.removeprefix(ARCHITECTURE)
    if name not in ARCHITECTURES:
        raise CaptureError(
            f"source {source!r}",
            "names no architecture",
            f"There are {', '.join(ARCHITECTURE + known for known in ARCHITECTURES)}.",
        )
    length = condition_length or ARCHITECTURES[name].condition_length
    return unet_source(build_architecture(name, outliers=outliers), source, length)


def build_architecture(name: str, *, seed: int = 0, outliers: bool = False) -> nn.Module:
    """The module of a named architecture with seeded weights; equal on every machine."""
    import diffusers

    found = ARCHITECTURES[name]
    with torch.device("meta"):
        module: nn.Module = getattr(diffusers, found.kind)(**found.options)
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    norms = {path for path, child in module.named_modules() if isinstance(child, nn.GroupNorm | nn.LayerNorm)}
    for parameter_name, parameter in module.named_parameters():
        owner, _, leaf = parameter_name.rpartition(".")
        generator = torch.Generator().manual_seed(crc32(parameter_name.encode()) + seed)
        _fill(parameter.data, leaf, owner in norms, generator, outliers=outliers)
    return module


def _fill(tensor: Tensor, leaf: str, norm: bool, generator: torch.Generator, *, outliers: bool) -> None:
    if leaf == "bias":
        tensor.normal_(0, 0.02, generator=generator)
    elif not norm:
        tensor.normal_(0, 1 / math.sqrt(max(tensor[0].numel(), 1)), generator=generator)
    else:
        tensor.normal_(1, 0.1, generator=generator)
        if outliers:
            chosen = torch.randperm(len(tensor), generator=generator)[: max(1, len(tensor) // OUTLIER_EVERY)]
            tensor[chosen] *= torch.empty(len(chosen)).uniform_(8, 32, generator=generator)
