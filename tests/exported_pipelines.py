"""Tiny pipelines and what `hqc export --pipeline` makes of them."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from text_pipelines import save_text_pipeline
from tiny_pipeline import save_tiny_pipeline

from hqc.capture import trace
from hqc.export.pipeline_folder import export_pipeline
from hqc.models.ldm import UnconditionalLDMPipeline

__all__ = ["SOURCES", "exported"]


def _save_unconditional(folder: Path) -> Path:
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
    scheduler = DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    UnconditionalLDMPipeline(vae, unet, scheduler).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


SOURCES = {
    "classes": lambda work: save_tiny_pipeline(work / "pipeline"),
    "prompts": lambda work: save_text_pipeline("sd15", work),
    "nothing": _save_unconditional,
}


def exported(name: str, work: Path, target: str = "portable", **options: object) -> tuple[Path, Path]:
    """The source's folder and the export's."""
    work.mkdir(parents=True, exist_ok=True)
    source = SOURCES[name](work)
    export_pipeline(trace(str(source)), target, work / name, pipeline=source, **options)  # type: ignore[arg-type]
    return source, work / name
