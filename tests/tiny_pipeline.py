"""A class-conditional pipeline of a few kilobytes in diffusers layout, with the bundled model's shapes around it."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from hqc.models.ldm import ClassConditionalLDMPipeline, ClassEmbedder

__all__ = ["save_tiny_pipeline", "tiny_pipeline"]


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
    scheduler = DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    pipeline = ClassConditionalLDMPipeline(vae, unet, scheduler, ClassEmbedder(num_classes=10, dim=32))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_pipeline(folder: Path) -> Path:
    """Writes it, all floats in float32."""
    tiny_pipeline().save_pretrained(folder)
    return folder
