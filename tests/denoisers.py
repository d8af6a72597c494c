"""Tiny diffusers denoisers, one of each family: seeded weights, none of them zero, so that every layer matters."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from hqc.capture import trace
from hqc.capture.diffusers_models import denoiser_source
from hqc.capture.source import Source
from hqc.program import Program

__all__ = ["CONDITIONAL_UNETS", "DENOISERS", "TRANSFORMERS", "captured_denoiser", "denoiser", "source_of"]


def _unet(**options: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    common: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**common, **options})  # type: ignore[no-any-return]


def sd15() -> nn.Module:
    """Stable Diffusion 1.5: convolutions as projections, eight heads everywhere."""
    return _unet(attention_head_dim=8)


def sd21() -> nn.Module:
    """Stable Diffusion 2.1: linear projections, heads of one size."""
    return _unet(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True)


def sdxl() -> nn.Module:
    """Stable Diffusion XL: text_embeds [N, 32] and time_ids [N, 6]."""
    return _unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )


def inpainting() -> nn.Module:
    """Nine input channels: four of noise, a mask, four of the masked image."""
    return _unet(attention_head_dim=8, in_channels=9)


def labelled() -> nn.Module:
    """An unconditional UNet with class labels."""
    from diffusers import UNet2DModel

    return UNet2DModel(  # type: ignore[no-any-return]
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        num_class_embeds=7,
    )


def dit() -> nn.Module:
    """DiT: class labels, a learned variance in the output."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(  # type: ignore[no-any-return]
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,  # the null class of diffusers' pipeline is 1000
        norm_num_groups=8,
    )


def pixart(**options: Any) -> nn.Module:
    """PixArt-α: a caption with its mask, sizes, a learned variance."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(  # type: ignore[no-any-return]
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        caption_channels=24,
        sample_size=8,
        norm_num_groups=8,
        **{"use_additional_conditions": True, **options},
    )


def pixart_512() -> nn.Module:
    """PixArt-α of 512 pixels: without sizes."""
    return pixart(use_additional_conditions=False)


def sd3() -> nn.Module:
    """Stable Diffusion 3.5 medium's parts: joint attention, a block of dual attention, normalised queries."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(  # type: ignore[no-any-return]
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def flux() -> nn.Module:
    """FLUX.1-dev's parts: packed latents, rotary places, guidance as an input."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(  # type: ignore[no-any-return]
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


CONDITIONAL_UNETS: Mapping[str, Callable[[], nn.Module]] = {f.__name__: f for f in (sd15, sd21, sdxl, inpainting)}
TRANSFORMERS: Mapping[str, Callable[[], nn.Module]] = {f.__name__: f for f in (dit, pixart, sd3, flux)}
DENOISERS: Mapping[str, Callable[[], nn.Module]] = {
    **CONDITIONAL_UNETS,
    "labelled": labelled,
    "pixart_512": pixart_512,
    **TRANSFORMERS,
}
LATENT_SIZES: Mapping[str, int] = {"flux": 8}
TOKENS = 5


def denoiser(name: str) -> nn.Module:
    """The module, in eval mode; what diffusers initialises with zeros (modulations, biases) gets small numbers."""
    torch.manual_seed(31)
    model = DENOISERS[name]().eval()
    generator = torch.Generator().manual_seed(32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(0, 0.1, generator=generator)
    return model


def source_of(name: str) -> Source:
    """The module as a source: five tokens of condition."""
    return denoiser_source(denoiser(name), name, TOKENS, LATENT_SIZES.get(name))


@cache
def captured_denoiser(name: str) -> Program:
    """Its program, captured once a session; never change it in place."""
    return trace(source_of(name))
