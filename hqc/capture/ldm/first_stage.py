"""What surrounds the denoiser: autoencoder, class embedder and schedule, and which tensors fill them."""

from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture.ldm.config import ClassParams, LdmConfig
from hqc.capture.ldm.names import vae_name
from hqc.capture.matching import Piece, identity

__all__ = ["build_embedder", "build_scheduler", "build_vae", "embedder_pieces", "vae_pieces"]


def build_vae(config: LdmConfig, scale_factor: float) -> nn.Module:
    """diffusers' AutoencoderKL, or VQModel with its codebook, on the meta device.

    scale_factor: the denoiser works on latents times this.
    """
    import diffusers

    stage, coder = config.first_stage_config, config.first_stage_config.params.ddconfig
    down = ["AttnDownEncoderBlock2D" if attended else "DownEncoderBlock2D" for attended in coder.attended]
    up = ["AttnUpDecoderBlock2D" if attended else "UpDecoderBlock2D" for attended in reversed(coder.attended)]
    options: dict[str, Any] = {
        "in_channels": coder.in_channels,
        "out_channels": coder.out_ch,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "block_out_channels": coder.channels,
        "layers_per_block": coder.num_res_blocks,
        "latent_channels": coder.z_channels,
        "sample_size": coder.resolution,
        "scaling_factor": scale_factor,
    }
    if stage.quantised:
        options |= {"num_vq_embeddings": stage.params.n_embed, "vq_embed_dim": stage.params.embed_dim}
    with torch.device("meta"):
        vae: nn.Module = (diffusers.VQModel if stage.quantised else diffusers.AutoencoderKL)(**options)
    return vae.eval().requires_grad_(False)


def vae_pieces(vae: nn.Module, levels: int) -> dict[str, Piece]:
    """For each parameter of `build_vae`'s module the tensor of the checkpoint that fills it."""
    pieces = {}
    for name, parameter in vae.named_parameters():
        shape = tuple(parameter.shape)
        # Attention is made of 1×1 convolutions [C, C, 1, 1] in the original, of linear layers [C, C] in diffusers.
        linear = ".attentions." in name and len(shape) == 2
        key = "first_stage_model." + vae_name(name, levels)
        pieces[name] = Piece(key, (*shape, 1, 1) if linear else shape, _without_pixels if linear else identity)
    return pieces


def _without_pixels(tensor: Tensor) -> Tensor:
    """[C, C, 1, 1] -> [C, C]."""
    return tensor[:, :, 0, 0]


def build_embedder(params: ClassParams) -> nn.Module:
    """The class embedder on the meta device; its last row stands for "no class"."""
    from hqc.models.ldm import ClassEmbedder

    with torch.device("meta"):
        embedder: nn.Module = ClassEmbedder(num_classes=params.n_classes - 1, dim=params.embed_dim)
    return embedder.eval().requires_grad_(False)


def embedder_pieces(embedder: nn.Module) -> dict[str, Piece]:
    """For each parameter of the class embedder the tensor of the checkpoint that fills it."""
    return {name: Piece(f"cond_stage_model.{name}", tuple(p.shape)) for name, p in embedder.named_parameters()}


def build_scheduler(config: LdmConfig) -> Any:
    """DDIM as the original samples: β linear in √β, ᾱ of step 0 at the end, timesteps 1, 1 + T/S, …."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=config.timesteps,
        beta_start=config.linear_start,
        beta_end=config.linear_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
