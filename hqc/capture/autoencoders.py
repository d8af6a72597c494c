"""The two halves of an autoencoder as sources: programs of one input, `sample`, and without a timestep.

vae-encoder    image [N, C, H, W] -> moments [N, 2·L, h, w]    mean and log variance, of which diffusers draws
vae-decoder    latents [N, L, h, w] -> image [N, C, H, W]      what diffusers' `decode` takes: divided by its scale
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from hqc.capture.diffusers_models import CaptureOptions, load_denoiser, plain_config, read_class
from hqc.capture.source import Source, versions
from hqc.errors import CaptureError
from hqc.program import BATCH, InputSpec, Origin
from hqc.sizes import sides

__all__ = ["KIND", "Part", "VaePart", "autoencoder_source", "from_autoencoder", "part_of"]

Part = Literal["denoiser", "vae-encoder", "vae-decoder"]
"""What of a pipeline is captured."""

KIND = "AutoencoderKL"
_PREFIX = "vae."


class VaePart(nn.Module):
    """One half of diffusers' AutoencoderKL as forward(sample) -> tensor."""

    def __init__(self, vae: nn.Module, part: Part) -> None:
        super().__init__()
        order = ("encoder", "quant_conv") if part == "vae-encoder" else ("post_quant_conv", "decoder")
        self.vae = nn.Sequential(OrderedDict((name, own) for name in order if (own := getattr(vae, name)) is not None))

    def forward(self, sample: Tensor) -> Tensor:
        return self.vae(sample)  # type: ignore[no-any-return]


def part_of(origin: Origin) -> Part:
    """Which part of a pipeline a program is."""
    kind, _, part = origin.kind.partition(".")
    return f"vae-{part}" if kind == KIND and f"vae-{part}" in get_args(Part) else "denoiser"  # type: ignore[return-value]


def from_autoencoder(folder: Path, name: str, part: Part, options: CaptureOptions) -> Source:
    """A half of the autoencoder in a pipeline folder's vae/, or of the folder of an autoencoder by itself.

    Raises:
        CaptureError: if there is none, it is of another class, or cannot be loaded.
    """
    own = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (own / "config.json").is_file():
        raise CaptureError(str(folder), "has no vae/ folder", "Give a pipeline with one, or leave --part out.")
    kind = read_class(own)
    if kind != KIND:
        raise CaptureError(str(own), f"holds a {kind}; --part {part} takes an {KIND}", "Leave --part out.")
    if options.weights is not None or options.condition_length is not None:
        given = "--weights" if options.weights is not None else "--condition-length"
        raise CaptureError(f"--part {part}", f"takes no {given}", "Leave it out; it belongs to a denoiser.")
    if options.latent_size is None:
        options = replace(options, latent_size=_denoiser_size(folder))
    pipeline = folder if own != folder and (folder / "model_index.json").is_file() else None
    return autoencoder_source(load_denoiser(own, kind, options.variant), name, part, options, pipeline)


def _denoiser_size(folder: Path) -> Any:
    """The side of the latents that the pipeline's denoiser is made for, if it says so."""
    for part in ("unet", "transformer"):
        try:
            config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        size = config.get("sample_size") if isinstance(config, Mapping) else None
        if isinstance(size, int) and size > 0:
            return size
    return None


def autoencoder_source(
    vae: Any, name: str, part: Part, options: CaptureOptions | None = None, pipeline: Path | None = None
) -> Source:
    """A half of a loaded AutoencoderKL as a source, for latents of the size asked for, or of its own."""
    config = vae.config
    scale = 2 ** (len(config.block_out_channels) - 1)
    height, width = sides((options and options.latent_size) or max(1, int(config.sample_size) // scale))
    if part == "vae-encoder":
        shape = (BATCH, int(config.in_channels), height * scale, width * scale)
    else:
        shape = (BATCH, int(config.latent_channels), height, width)
    origin = Origin(
        source=name,
        kind=f"{KIND}.{part.removeprefix('vae-')}",
        pipeline="" if pipeline is None else name if name == "digits" else str(pipeline.resolve()),
        unet_config={**plain_config(config), "_class_name": KIND},
        versions=versions(),
    )
    return Source(VaePart(vae, part), (InputSpec("sample", shape),), origin, pipeline, prefix=_PREFIX)
