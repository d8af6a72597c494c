"""Tiny text-conditional pipelines in diffusers layout: seeded text encoders, letters as tokens."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from denoisers import TOKENS, denoiser
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

__all__ = ["MORE_PIPELINES", "TEXT_PIPELINES", "save_text_pipeline", "text_pipeline"]

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_VOCABULARY = (*_LETTERS, *(f"{c}</w>" for c in _LETTERS), "ca", "<|startoftext|>", "<|endoftext|>")


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte pairs with one merge: every letter is a token, but "ca"."""
    folder.mkdir(parents=True)
    vocabulary = {token: number for number, token in enumerate(_VOCABULARY)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def _t5_tokenizer() -> T5TokenizerFast:
    """Every letter is a token."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in _LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)


def _t5(width: int, seed: int) -> T5EncoderModel:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=4 + len(_LETTERS), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def _encoder(kind: Any, width: int, seed: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=len(_VOCABULARY) - 2,
        eos_token_id=len(_VOCABULARY) - 1,
        projection_dim=32,
    )
    torch.manual_seed(seed)
    return kind(config).eval()


def _parts(**options: Any) -> dict[str, Any]:
    torch.manual_seed(40)
    vae = AutoencoderKL(
        **options,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    # What diffusers' pipelines ask of a scheduler.
    scheduler = DDIMScheduler(num_train_timesteps=100, clip_sample=False, steps_offset=1)
    return {"vae": vae, "scheduler": scheduler}


def _stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        **_parts(),
        text_encoder=_encoder(CLIPTextModel, 32, 41),
        tokenizer=_tokenizer(folder / "words"),
        unet=denoiser("sd15"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        **_parts(),
        text_encoder=_encoder(CLIPTextModel, 16, 41),
        text_encoder_2=_encoder(CLIPTextModelWithProjection, 16, 42),
        tokenizer=_tokenizer(folder / "words"),
        tokenizer_2=_tokenizer(folder / "words 2"),
        unet=denoiser("sdxl"),
        add_watermarker=False,
    )


def _text_unet(**options: Any) -> nn.Module:
    torch.manual_seed(43)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=8,
        **options,
    ).eval()


def _latent_consistency(folder: Path) -> LatentConsistencyModelPipeline:
    return LatentConsistencyModelPipeline(
        vae=_parts()["vae"],
        text_encoder=_encoder(CLIPTextModel, 32, 41),
        tokenizer=_tokenizer(folder / "words"),
        unet=_text_unet(time_cond_proj_dim=16),
        scheduler=LCMScheduler(original_inference_steps=50),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _upscale(folder: Path) -> StableDiffusionUpscalePipeline:
    return StableDiffusionUpscalePipeline(
        **_parts(scaling_factor=0.08333),
        text_encoder=_encoder(CLIPTextModel, 32, 41),
        tokenizer=_tokenizer(folder / "words"),
        unet=_text_unet(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(),
    )


def _stable_diffusion_3(folder: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        vae=_parts(shift_factor=0.1)["vae"],
        text_encoder=_encoder(CLIPTextModelWithProjection, 16, 41),
        text_encoder_2=_encoder(CLIPTextModelWithProjection, 16, 42),
        text_encoder_3=_t5(32, 44),
        tokenizer=_tokenizer(folder / "words"),
        tokenizer_2=_tokenizer(folder / "words 2"),
        tokenizer_3=_t5_tokenizer(),
        transformer=denoiser("sd3"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _pixart(folder: Path) -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(
        **_parts(),
        text_encoder=_t5(24, 44),
        tokenizer=_t5_tokenizer(),
        transformer=denoiser("pixart"),
    )


def _flux(folder: Path) -> FluxPipeline:
    return FluxPipeline(
        vae=_parts(shift_factor=0.1)["vae"],
        text_encoder=_encoder(CLIPTextModel, 24, 41),
        text_encoder_2=_t5(32, 44),
        tokenizer=_tokenizer(folder / "words"),
        tokenizer_2=_t5_tokenizer(),
        transformer=denoiser("flux"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


TEXT_PIPELINES: Mapping[str, Callable[[Path], Any]] = {"sd15": _stable_diffusion, "sdxl": _stable_diffusion_xl}


MORE_PIPELINES: Mapping[str, Callable[[Path], Any]] = {
    "lcm": _latent_consistency,
    "upscale": _upscale,
    "sd3": _stable_diffusion_3,
    "pixart": _pixart,
    "flux": _flux,
}
"""Pipelines whose denoisers take more than a prompt's encoding."""


def text_pipeline(name: str, work: Path) -> Any:
    """The pipeline around a denoiser of that name; `work` takes the tokenizer's files."""
    pipeline = {**TEXT_PIPELINES, **MORE_PIPELINES}[name](work)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_text_pipeline(name: str, work: Path) -> Path:
    """Writes it to work/pipeline, all floats in float32."""
    text_pipeline(name, work).save_pretrained(work / "pipeline")
    return work / "pipeline"
