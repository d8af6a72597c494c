"""Tiny pipelines of every kind with seeded weights: saved and captured once a process.

Those that are asked with a class or with nothing are here, those that take a prompt in `text_pipelines`.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from denoisers import TOKENS, denoiser
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
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from hqc.capture import trace
from hqc.models.ldm import ClassConditionalLDMPipeline, ClassEmbedder, UnconditionalLDMPipeline
from hqc.program import Program

__all__ = [
    "IMAGE_PIPELINES",
    "save_pipeline",
    "save_tiny_pipeline",
    "saved_pipeline",
    "tiny_pipeline",
    "traced_pipeline",
]


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=100, clip_sample=False)


def tiny_pipeline() -> ClassConditionalLDMPipeline:
    """Latents 4×4×4 (ten classes), decoded to 1×32×32, the size that the digit classifier takes."""
    torch.manual_seed(21)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=32,
        attention_head_dim=32,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    pipeline = ClassConditionalLDMPipeline(vae, unet, _ddim(), ClassEmbedder(num_classes=10, dim=32))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unconditional() -> UnconditionalLDMPipeline:
    """The bundled class without a class: latents 4×4×2."""
    torch.manual_seed(31)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(16,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5,
    )
    return UnconditionalLDMPipeline(vae, unet, _ddim())


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


IMAGE_PIPELINES: Mapping[str, Callable[[], Any]] = {
    "classes": tiny_pipeline,
    "nothing": _unconditional,
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
"""By the name of their kind; "classes" is `tiny_pipeline`."""


def save_tiny_pipeline(folder: Path) -> Path:
    """Writes it, all floats in float32."""
    tiny_pipeline().save_pretrained(folder)
    return folder


def save_pipeline(name: str, folder: Path) -> Path:
    """Writes the pipeline of a kind, all floats in float32: its folder, which is inside the given one."""
    if name not in IMAGE_PIPELINES:
        from text_pipelines import save_text_pipeline  # transformers takes long to import

        return save_text_pipeline(name, folder)
    place = folder / "pipeline"
    IMAGE_PIPELINES[name]().save_pretrained(place)
    if name == "dit":  # as in the index on the hub; diffusers does not write it
        index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        names = {"0": "tench", "1": "goldfish, Carassius auratus"}
        (place / "model_index.json").write_text(json.dumps({**index, "id2label": names}), encoding="utf-8")
    return place


_TRACED: Mapping[str, Mapping[str, Any]] = {
    "sd3": {"condition_length": TOKENS + 4},
    "pixart": {"condition_length": TOKENS},
    "flux": {"condition_length": TOKENS, "latent_size": 8},
}
"""Options without which these are captured for prompts of hundreds of tokens."""


@cache
def saved_pipeline(name: str) -> Path:
    """The folder of the pipeline of a kind, written once a process; nothing in it is to be changed."""
    folder = Path(tempfile.mkdtemp(prefix=f"hqc-tests-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save_pipeline(name, folder)


def traced_pipeline(name: str, part: str = "denoiser") -> Program:
    """The denoiser of `saved_pipeline`, or a half of its autoencoder, captured once a process.

    Never change it in place.
    """
    return _traced(name, part)


@cache
def _traced(name: str, part: Any) -> Program:
    return trace(str(saved_pipeline(name)), part=part, **_TRACED.get(name, {}))
