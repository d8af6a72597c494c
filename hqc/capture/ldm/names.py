"""diffusers' parameter names in the original naming: one rule a kind of layer, from the wanted name to the given one.

Read in this direction the rules say for every parameter of a model which tensor of the checkpoint fills it, so what
is missing, superfluous or of another shape can be listed in the checkpoint's own names.

    down_blocks.1.resnets.0.conv1.weight     input_blocks.4.0.in_layers.2.weight
    up_blocks.0.attentions.1.norm.weight     output_blocks.1.1.norm.weight
    decoder.up_blocks.0.resnets.2.norm1.bias decoder.up.{levels - 1}.block.2.norm1.bias
"""

from collections.abc import Sequence

__all__ = ["attention_name", "unet_name", "vae_name"]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_EDGES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str, layers: int, attended: Sequence[bool]) -> str:
    """The original name of a parameter of diffusers' UNet.

    layers: res blocks of a level on the way down. attended: which levels, from the full resolution down, have
    attention: their upsampler comes third in its block.
    """
    owner, _, leaf = name.rpartition(".")
    if owner in _EDGES:
        return f"{_EDGES[owner]}.{leaf}"
    match name.split("."):
        case ["mid_block", "resnets", j, *rest]:
            return f"middle_block.{2 * int(j)}.{_resnet(rest)}"
        case ["mid_block", "attentions", "0", *rest]:
            return ".".join(["middle_block.1", *rest])
        case ["down_blocks", i, part, j, *rest]:
            first = 1 + int(i) * (layers + 1)
            if part == "downsamplers":
                return f"input_blocks.{first + layers}.0.{_sampler(rest, 'op')}"
            return f"input_blocks.{first + int(j)}.{_block(part, rest)}"
        case ["up_blocks", i, part, j, *rest]:
            first = int(i) * (layers + 1)
            if part == "upsamplers":
                place = 2 if attended[len(attended) - 1 - int(i)] else 1
                return f"output_blocks.{first + layers}.{place}.{_sampler(rest, 'conv')}"
            return f"output_blocks.{first + int(j)}.{_block(part, rest)}"
    raise ValueError(f"{name} is no parameter of a UNet")


def _block(part: str, rest: Sequence[str]) -> str:
    return f"0.{_resnet(rest)}" if part == "resnets" else ".".join(["1", *rest])


def _resnet(rest: Sequence[str]) -> str:
    layer, leaf = rest
    return f"{_RESNET[layer]}.{leaf}"


def _sampler(rest: Sequence[str], convolution: str) -> str:
    """A resampling convolution, or a res block that resamples."""
    layer, leaf = rest
    return f"{convolution}.{leaf}" if layer == "conv" else _resnet(rest)


def attention_name(name: str, joined: bool) -> str:
    """diffusers' self-attention in the original's: `joined` where q, k and v are one tensor."""
    for part in ("to_q", "to_k", "to_v"):
        name = name.replace(f".{part}.", ".qkv." if joined else f".{part[-1]}.")
    return name.replace(".to_out.0.", ".proj_out.").replace(".group_norm.", ".norm.")


def vae_name(name: str, levels: int) -> str:
    """The original name of a parameter of diffusers' AutoencoderKL or VQModel with so many levels."""
    match name.split("."):
        case [side, "mid_block", "resnets", j, *rest]:
            return _vae(f"{side}.mid.block_{int(j) + 1}", rest)
        case [side, "mid_block", "attentions", "0", *rest]:
            return _vae(f"{side}.mid.attn_1", rest)
        case [side, "down_blocks" | "up_blocks" as blocks, i, part, j, *rest]:
            down = blocks == "down_blocks"
            level = f"{side}.down.{i}" if down else f"{side}.up.{levels - 1 - int(i)}"
            if part.endswith("samplers"):
                return _vae(f"{level}.{'downsample' if down else 'upsample'}", rest)
            return _vae(f"{level}.{'block' if part == 'resnets' else 'attn'}.{j}", rest)
        case [side, "conv_norm_out", leaf]:
            return f"{side}.norm_out.{leaf}"
    return name


def _vae(owner: str, rest: Sequence[str]) -> str:
    name = ".".join([owner, *rest]).replace(".conv_shortcut.", ".nin_shortcut.")
    return attention_name(name, joined=False) if "attn" in owner else name
