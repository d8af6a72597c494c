"""Named architectures as sources: the published sizes with seeded weights, for benchmarks without a download.

weights   normal, σ = 1/√fan_in;  biases normal, σ = 0.02;  norms 1 + 0.1·normal
outliers  one channel in 64 of every norm carries 8…32 times its weight: heavy-tailed activations behind it
"""

import difflib
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from hqc.capture.diffusers_models import denoiser_source
from hqc.capture.ldm.unet import set_heads
from hqc.capture.source import Source
from hqc.errors import CaptureError
from hqc.memory import require_memory, trace_bytes
from hqc.sizes import LatentSize

__all__ = [
    "ARCHITECTURE",
    "ARCHITECTURES",
    "build_architecture",
    "empty_architecture",
    "fill_seeded",
    "from_architecture",
]

ARCHITECTURE = "arch:"
OUTLIER_EVERY = 64


@dataclass(frozen=True)
class Architecture:
    """A model by name: its diffusers class and options, the tokens of its condition.

    heads: of every attention, where diffusers' class can only fix the width of a head.
    """

    kind: str
    options: Mapping[str, Any]
    condition_length: int = 1
    heads: int | None = None


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
            # diffusers reads attention_head_dim as the number of heads here; cin256-v2 has one.
            "attention_head_dim": 1,
        },
    ),
    "ldm4-bedroom": Architecture(
        "UNet2DModel",
        {
            "sample_size": 64,
            "block_out_channels": (224, 448, 672, 896),
            "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
            "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
            "attention_head_dim": 32,
        },
    ),
    "ldm8-church": Architecture(
        "UNet2DModel",
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (192, 384, 384, 768, 768),
            "down_block_types": (*["AttnDownBlock2D"] * 4, "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", *["AttnUpBlock2D"] * 4),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 32,
            "attention_head_dim": 192,
        },
        heads=8,
    ),
    "sd15": Architecture("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}, 77),
    "sdxl": Architecture(
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        77,
    ),
}


def from_architecture(
    source: str, *, condition_length: int | None = None, latent_size: LatentSize | None = None, outliers: bool = False
) -> Source:
    """`arch:NAME` as a source.

    Raises:
        CaptureError: for a name that is not among `ARCHITECTURES`.
    """
    name = source.removeprefix(ARCHITECTURE)
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        raise CaptureError(
            f"source {source!r}",
            f"names no architecture{f' (nearest: {ARCHITECTURE}{near[0]})' if near else ''}",
            f"There are {', '.join(ARCHITECTURE + known for known in ARCHITECTURES)}.",
        )
    length = condition_length or ARCHITECTURES[name].condition_length
    return denoiser_source(build_architecture(name, outliers=outliers), source, length, latent_size)


def build_architecture(name: str, *, seed: int = 0, outliers: bool = False) -> nn.Module:
    """The module of a named architecture with seeded weights; equal on every machine.

    Raises:
        MemoryShortError: if it does not fit the memory that is free.
    """
    module: Any = empty_architecture(name)
    needed = trace_bytes(sum(parameter.numel() for parameter in module.parameters()), module.config)
    require_memory(f"tracing {ARCHITECTURE}{name}", needed)
    return fill_seeded(module.to_empty(device="cpu"), seed=seed, outliers=outliers)


def empty_architecture(name: str) -> nn.Module:
    """The module on the meta device: its structure without weights."""
    import diffusers

    found = ARCHITECTURES[name]
    with torch.device("meta"):
        module: nn.Module = getattr(diffusers, found.kind)(**found.options)
    if found.heads is not None:
        set_heads(module, found.heads)
    return module.eval().requires_grad_(False)


def fill_seeded(module: nn.Module, *, seed: int = 0, outliers: bool = False) -> nn.Module:
    """Fills a module's parameters in place, each from a generator of its own name; see the file's first lines."""
    norms = {path for path, child in module.named_modules() if isinstance(child, nn.GroupNorm | nn.LayerNorm)}

    def fill(named: tuple[str, nn.Parameter]) -> None:
        owner, _, leaf = named[0].rpartition(".")
        generator = torch.Generator().manual_seed(crc32(named[0].encode()) + seed)
        _fill(named[1].data, leaf, owner in norms, generator, outliers=outliers)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a generator each: the order does not matter
        list(pool.map(fill, module.named_parameters()))
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
