"""Tiny pipelines of diffusers that are asked with a class or with nothing: seeded weights, none of them zero."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from denoisers import denoiser
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)

__all__ = ["IMAGE_PIPELINES", "save_image_pipeline"]


def _unet(**options: Any) -> UNet2DModel:
    torch.manual_seed(50)
    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
        **options,
    )


def _autoencoder(kind: Any, channels: int) -> Any:
    torch.manual_seed(51)
    return kind(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=100, clip_sample=False)


IMAGE_PIPELINES: Mapping[str, Callable[[], Any]] = {
    "ddpm": lambda: DDPMPipeline(_unet(), DDPMScheduler(num_train_timesteps=100)),
    "ddim": lambda: DDIMPipeline(_unet(), _ddim()),
    "ldm": lambda: LDMPipeline(_autoencoder(VQModel, 3), _unet(), _ddim()),
    "dit": lambda: DiTPipeline(denoiser("dit"), _autoencoder(AutoencoderKL, 4), _ddim()),
    "consistency": lambda: ConsistencyModelPipeline(_unet(), CMStochasticIterativeScheduler()),
    "consistency_classes": lambda: ConsistencyModelPipeline(
        _unet(num_class_embeds=7), CMStochasticIterativeScheduler()
    ),
    "ddpm_classes": lambda: DDPMPipeline(_unet(num_class_embeds=7), DDPMScheduler(num_train_timesteps=100)),
}


def save_image_pipeline(name: str, folder: Path) -> Path:
    """Writes it, all floats in float32."""
    IMAGE_PIPELINES[name]().save_pretrained(folder)
    if name == "dit":  # as in the index on the hub; diffusers does not write it
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        names = {"0": "tench", "1": "goldfish, Carassius auratus"}
        (folder / "model_index.json").write_text(json.dumps({**index, "id2label": names}), encoding="utf-8")
    return folder
