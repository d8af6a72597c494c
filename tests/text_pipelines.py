"""Tiny text-conditional pipelines in diffusers layout: seeded text encoders, letters as tokens."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from denoisers import TOKENS, denoiser
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["TEXT_PIPELINES", "save_text_pipeline", "text_pipeline"]

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_VOCABULARY = (*_LETTERS, *(f"{c}</w>" for c in _LETTERS), "ca", "<|startoftext|>", "<|endoftext|>")


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte pairs with one merge: every letter is a token, but "ca"."""
    folder.mkdir(parents=True)
    vocabulary = {token: number for number, token in enumerate(_VOCABULARY)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


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


def _parts() -> dict[str, Any]:
    torch.manual_seed(40)
    vae = AutoencoderKL(
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


TEXT_PIPELINES: Mapping[str, Callable[[Path], Any]] = {"sd15": _stable_diffusion, "sdxl": _stable_diffusion_xl}


def text_pipeline(name: str, work: Path) -> Any:
    """The pipeline around `denoisers.denoiser(name)`; `work` takes the tokenizer's files."""
    pipeline = TEXT_PIPELINES[name](work)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_text_pipeline(name: str, work: Path) -> Path:
    """Writes it to work/pipeline, all floats in float32."""
    text_pipeline(name, work).save_pretrained(work / "pipeline")
    return work / "pipeline"
