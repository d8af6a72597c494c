"""The keys of a LoRA file: which layer and which part of its LoRA a tensor is.

    unet.down_blocks.1.attentions.0.proj_in.lora_A.weight                      diffusers, PEFT
    base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.weight          PEFT alone
    unet.down_blocks.1.attentions.0.proj_in.lora.down.weight                   diffusers, earlier
    unet.mid_block.attentions.0.….attn1.processor.to_q_lora.down.weight        diffusers, at first
    lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight              kohya
    lora_unet_input_blocks_4_1_proj_in.lora_down.weight                        kohya, in the original naming

A kohya name has lost its dots, so layers are looked up by their names without dots, whatever the file has.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

from hqc.site_names import whole_site

__all__ = ["Part", "is_of_text_encoder", "layer_name", "layer_of", "layers_by_name", "split_key"]

Part = Literal["down", "up", "mid", "alpha"]

_ENDINGS: tuple[tuple[str, Part], ...] = (
    (r"\.(?:lora_A(?:\.default)?|lora\.down|lora_down)\.weight", "down"),
    (r"\.(?:lora_B(?:\.default)?|lora\.up|lora_up)\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.alpha", "alpha"),
)
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight")
_PREFIXES = (
    *("base_model.model.", "unet.", "transformer.", "model.diffusion_model.", "diffusion_model."),
    *("lora_unet_", "lora_transformer_"),
)
_TEXT = re.compile(r"(?:base_model\.model\.)?(?:text_encoder(?:_\d)?\.|lora_te\d?_)")


def is_of_text_encoder(key: str) -> bool:
    """Whether a tensor belongs to a text encoder, not to the denoiser.

    >>> is_of_text_encoder("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"), is_of_text_encoder("unet.alpha")
    (True, False)
    """
    return _TEXT.match(key) is not None


def split_key(key: str) -> tuple[str, Part] | None:
    """The layer as the file calls it, and the part; None for a key of another kind.

    >>> split_key("lora_unet_mid_block_resnets_0_conv1.lora_down.weight")
    ('lora_unet_mid_block_resnets_0_conv1', 'down')
    >>> split_key("unet.up.attn1.processor.to_out_lora.up.weight")
    ('unet.up.attn1.to_out.0', 'up')
    """
    if found := _PROCESSOR.fullmatch(key):
        layer = "to_out.0" if found[2] == "to_out" else found[2]
        return f"{found[1]}.{layer}", "down" if found[3] == "down" else "up"
    for ending, part in _ENDINGS:
        if found := re.search(f"{ending}$", key):
            return key[: found.start()], part
    return None


def layer_name(site: str) -> str:
    """The layer whose weight a site has: without the part of a split one and the number of a later call.

    >>> layer_name("up.0.conv_shortcut:1"), layer_name("norm.linear@2")
    ('up.0.conv_shortcut', 'norm.linear')
    """
    return re.sub(r"@\d+$", "", whole_site(site))


def layers_by_name(sites: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The layers of sites by what a file may call them, without dots. config: of the denoiser, for original names.

    A name that two layers would have is of neither.
    """
    found: dict[str, str] = {}
    twice = set()
    for layer in sorted({layer_name(site) for site in sites}):
        for name in {_plain(layer), *map(_plain, _original_names(layer, config))}:
            if found.setdefault(name, layer) != layer:
                twice.add(name)
    return {name: layer for name, layer in found.items() if name not in twice}


def layer_of(name: str, layers: Mapping[str, str]) -> str | None:
    """The layer that a file calls so, with whatever prefix; None if there is none."""
    while True:
        if (found := layers.get(_plain(name))) is not None:
            return found
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)


def _plain(name: str) -> str:
    return name.replace(".", "_")


_LABELS = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def _original_names(layer: str, config: Mapping[str, Any]) -> Iterator[str]:
    """A layer of diffusers' UNet in the original naming, as files for Stable Diffusion XL have it."""
    from hqc.capture.ldm.names import unet_name

    if layer in _LABELS:
        yield _LABELS[layer]
        return
    layers, kinds = config.get("layers_per_block"), config.get("down_block_types")
    if config.get("_class_name") != "UNet2DConditionModel" or type(layers) is not int or not isinstance(kinds, list):
        return
    with suppress(ValueError, KeyError, IndexError):  # a layer that the original has not
        yield unet_name(f"{layer}.weight", layers, ["Attn" in str(kind) for kind in kinds]).removesuffix(".weight")
