"""The denoiser: diffusers' UNet for an original configuration, and which tensors fill it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture.ldm.config import UNetParams
from hqc.capture.ldm.names import attention_name, unet_name
from hqc.capture.matching import Piece, identity

__all__ = ["UNET_PREFIX", "build_unet", "set_heads", "unet_pieces"]

UNET_PREFIX = "model.diffusion_model."


def build_unet(params: UNetParams) -> nn.Module:
    """diffusers' UNet on the meta device: conditional with spatial transformers, else unconditional."""
    import diffusers

    conditional = params.use_spatial_transformer
    kind = diffusers.UNet2DConditionModel if conditional else diffusers.UNet2DModel
    with torch.device("meta"):
        unet: nn.Module = kind(**(_conditional(params) if conditional else _unconditional(params)))
    if not conditional and params.num_head_channels == -1:
        set_heads(unet, params.num_heads)
    return unet.eval().requires_grad_(False)


def _common(params: UNetParams) -> dict[str, Any]:
    return {
        "sample_size": params.image_size,
        "in_channels": params.in_channels,
        "out_channels": params.out_channels,
        "block_out_channels": params.channels,
        "layers_per_block": params.num_res_blocks,
        "resnet_time_scale_shift": "scale_shift" if params.use_scale_shift_norm else "default",
    }


def _conditional(params: UNetParams) -> dict[str, Any]:
    down = ["CrossAttnDownBlock2D" if attended else "DownBlock2D" for attended in params.attended]
    up = ["CrossAttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(params.attended)]
    return {
        **_common(params),
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "cross_attention_dim": params.context_dim,
        "transformer_layers_per_block": params.transformer_depth,
        "use_linear_projection": params.use_linear_in_transformer,
        # diffusers reads attention_head_dim as the number of heads here.
        "attention_head_dim": tuple(params.heads(channels) for channels in params.channels),
    }


def _unconditional(params: UNetParams) -> dict[str, Any]:
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if params.resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    resample = "resnet" if params.resblock_updown else "conv"
    return {
        **_common(params),
        "down_block_types": tuple("AttnDownBlock2D" if attended else plain[0] for attended in params.attended),
        "up_block_types": tuple("AttnUpBlock2D" if attended else plain[1] for attended in reversed(params.attended)),
        "downsample_type": resample,
        "upsample_type": resample,
        "attn_norm_num_groups": 32,  # diffusers leaves the middle's norm out with scale_shift otherwise
        # One width for all heads; where the original fixes their number instead, `set_heads` says so afterwards.
        "attention_head_dim": params.num_head_channels if params.num_head_channels != -1 else params.model_channels,
    }


def set_heads(unet: nn.Module, heads: int) -> None:
    """Gives every attention of a UNet so many heads: diffusers' UNet2DModel can only fix the width of a head.

    The weights of q, k and v are [C, C] whatever the number of heads, so only how they are cut changes.
    """
    from diffusers.models.attention_processor import Attention

    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = module.sliceable_head_dim = heads
            module.scale = (module.inner_dim // heads) ** -0.5


def unet_pieces(unet: nn.Module, params: UNetParams) -> dict[str, Piece]:
    """For each parameter of `build_unet`'s module the tensor of the checkpoint that fills it."""
    pieces = {}
    for name, parameter in unet.named_parameters():
        shape = tuple(parameter.shape)
        key = UNET_PREFIX + unet_name(name, params.num_res_blocks, params.attended)
        if ".attentions." in name and not params.use_spatial_transformer:
            pieces[name] = _attention_piece(name, attention_name(key, joined=True), shape, params)
        else:
            pieces[name] = Piece(key, shape)
    return pieces


def _attention_piece(name: str, key: str, shape: tuple[int, ...], params: UNetParams) -> Piece:
    """Self-attention over pixels: 1×1 convolutions [C, C, 1], with q, k and v in one tensor [3C, C, 1]."""
    if ".group_norm." in name:
        return Piece(key, shape)
    channels = shape[0]
    original = (channels, *shape[1:], *((1,) if len(shape) == 2 else ()))
    if ".qkv." not in key:
        return Piece(key, original, _without_pixel if len(shape) == 2 else identity)
    part = ("to_q", "to_k", "to_v").index(name.split(".")[-2])
    return Piece(key, (3 * channels, *original[1:]), _of_qkv(part, params.heads(channels)))


def _without_pixel(tensor: Tensor) -> Tensor:
    """[C, C, 1] -> [C, C]."""
    return tensor[:, :, 0]


def _of_qkv(part: int, heads: int) -> Callable[[Tensor], Tensor]:
    """q, k or v of the joined tensor, whose rows are ordered head by head: (heads, 3, C / heads)."""

    def take(joined: Tensor) -> Tensor:
        rows = joined.reshape(heads, 3, -1, *joined.shape[1:2])[:, part]
        return rows.reshape(len(joined) // 3, *joined.shape[1:2])

    return take


def fill(module: nn.Module, pieces: Mapping[str, Piece], tensors: Mapping[str, Tensor]) -> None:
    """Puts the checkpoint's tensors, in float32, in the place of a module's meta parameters."""
    state = {name: piece.take(tensors[piece.key]).float() for name, piece in pieces.items()}
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)
