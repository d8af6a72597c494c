"""The original latent-diffusion modules as functions over a state dict, in the original names and order.

Written from the published architecture, independently of diffusers and of hqc's conversion: `Weights` draws a seeded
tensor the first time a name is asked for, so that one forward pass gives the full set of keys of a checkpoint, and a
second pass over the same dictionary is the reference for what a converted model must compute.
"""

import math
import zlib
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Weights", "decode", "encode", "make_checkpoint", "save_config", "tiny_config", "unet"]


class Weights(dict[str, Tensor]):
    """Tensors by name; a missing one is drawn, normal with σ = 1/√fan_in, unless `frozen`."""

    frozen = False

    def get_or_draw(self, name: str, shape: tuple[int, ...], mean: float = 0.0, std: float | None = None) -> Tensor:
        if name not in self:
            assert not self.frozen, f"{name} was not drawn"
            std = std if std is not None else 1 / math.sqrt(math.prod(shape[1:]) or 1)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            self[name] = torch.empty(shape).normal_(mean, std, generator=generator)
        assert tuple(self[name].shape) == shape, f"{name} is {tuple(self[name].shape)}, not {shape}"
        return self[name]

    def conv(self, name: str, x: Tensor, out: int, size: int = 3, **options: Any) -> Tensor:
        weight = self.get_or_draw(f"{name}.weight", (out, x.shape[1], size, size))
        bias = self.get_or_draw(f"{name}.bias", (out,), std=0.05)
        return F.conv2d(x, weight, bias, padding=options.pop("padding", size // 2), **options)

    def conv1d(self, name: str, x: Tensor, out: int) -> Tensor:
        weight = self.get_or_draw(f"{name}.weight", (out, x.shape[1], 1))
        return F.conv1d(x, weight, self.get_or_draw(f"{name}.bias", (out,), std=0.05))

    def linear(self, name: str, x: Tensor, out: int, bias: bool = True) -> Tensor:
        weight = self.get_or_draw(f"{name}.weight", (out, x.shape[-1]))
        return F.linear(x, weight, self.get_or_draw(f"{name}.bias", (out,), std=0.05) if bias else None)

    def _affine(self, name: str, channels: int) -> tuple[Tensor, Tensor]:
        weight = self.get_or_draw(f"{name}.weight", (channels,), mean=1.0, std=0.2)
        return weight, self.get_or_draw(f"{name}.bias", (channels,), std=0.1)

    def group_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.group_norm(x, 32, *self._affine(name, x.shape[1]), eps=eps)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._affine(name, x.shape[-1]))


# ---- the denoiser --------------------------------------------------------------------------------------------------


def unet(w: Weights, p: dict[str, Any], x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
    """model.diffusion_model: input_blocks, middle_block, output_blocks, out."""
    root, width = "model.diffusion_model", p["model_channels"]
    half = width // 2
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    emb = w.linear(f"{root}.time_embed.0", torch.cat([angles.cos(), angles.sin()], 1), 4 * width)
    emb = w.linear(f"{root}.time_embed.2", F.silu(emb), 4 * width)

    x = w.conv(f"{root}.input_blocks.0.0", x, width)
    skips, block, scale = [x], 1, 1
    for level, factor in enumerate(p["channel_mult"]):
        for _ in range(p["num_res_blocks"]):
            x = _res_block(w, f"{root}.input_blocks.{block}.0", p, x, emb, factor * width)
            if scale in p["attention_resolutions"]:
                x = _attention(w, f"{root}.input_blocks.{block}.1", p, x, context)
            skips.append(x)
            block += 1
        if level < len(p["channel_mult"]) - 1:
            name = f"{root}.input_blocks.{block}.0"
            if p.get("resblock_updown"):
                x = _res_block(w, name, p, x, emb, x.shape[1], resample=lambda h: F.avg_pool2d(h, 2))
            else:
                x = w.conv(f"{name}.op", x, x.shape[1], stride=2, padding=1)
            skips.append(x)
            block, scale = block + 1, scale * 2

    x = _res_block(w, f"{root}.middle_block.0", p, x, emb, x.shape[1])
    x = _attention(w, f"{root}.middle_block.1", p, x, context)
    x = _res_block(w, f"{root}.middle_block.2", p, x, emb, x.shape[1])

    block = 0
    for level, factor in reversed(list(enumerate(p["channel_mult"]))):
        for i in range(p["num_res_blocks"] + 1):
            x = torch.cat([x, skips.pop()], 1)
            x = _res_block(w, f"{root}.output_blocks.{block}.0", p, x, emb, factor * width)
            place = 1
            if scale in p["attention_resolutions"]:
                x = _attention(w, f"{root}.output_blocks.{block}.1", p, x, context)
                place = 2
            if level > 0 and i == p["num_res_blocks"]:
                name = f"{root}.output_blocks.{block}.{place}"
                if p.get("resblock_updown"):
                    x = _res_block(w, name, p, x, emb, x.shape[1], resample=_double)
                else:
                    x = w.conv(f"{name}.conv", _double(x), x.shape[1])
                scale //= 2
            block += 1
    assert not skips
    return w.conv(f"{root}.out.2", F.silu(w.group_norm(f"{root}.out.0", x, 1e-5)), p["out_channels"])


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _res_block(
    w: Weights, name: str, p: dict[str, Any], x: Tensor, emb: Tensor, out: int, resample: Any = lambda h: h
) -> Tensor:
    h = resample(F.silu(w.group_norm(f"{name}.in_layers.0", x, 1e-5)))
    x = resample(x)
    h = w.conv(f"{name}.in_layers.2", h, out)
    shifted = bool(p.get("use_scale_shift_norm"))
    e = w.linear(f"{name}.emb_layers.1", F.silu(emb), out * (2 if shifted else 1))[:, :, None, None]
    if shifted:
        scale, shift = e.chunk(2, 1)
        h = w.group_norm(f"{name}.out_layers.0", h, 1e-5) * (1 + scale) + shift
    else:
        h = w.group_norm(f"{name}.out_layers.0", h + e, 1e-5)
    h = w.conv(f"{name}.out_layers.3", F.silu(h), out)
    return h + (x if x.shape[1] == out else w.conv(f"{name}.skip_connection", x, out, size=1))


def _heads(p: dict[str, Any], channels: int) -> int:
    return int(p.get("num_heads", -1)) if p.get("num_head_channels", -1) == -1 else channels // p["num_head_channels"]


def _attention(w: Weights, name: str, p: dict[str, Any], x: Tensor, context: Tensor | None) -> Tensor:
    heads = _heads(p, x.shape[1])
    if p.get("use_spatial_transformer"):
        return _spatial_transformer(w, name, p, x, context, heads)
    n, c, *size = x.shape
    flat = x.reshape(n, c, -1)
    qkv = w.conv1d(f"{name}.qkv", w.group_norm(f"{name}.norm", flat, 1e-5), 3 * c)
    # The legacy order: the joined channels are cut into heads first, then each head into q, k and v.
    q, k, v = qkv.reshape(n * heads, 3 * c // heads, -1).split(c // heads, dim=1)
    weights = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(c // heads)).softmax(-1)
    mixed = torch.einsum("bts,bcs->bct", weights, v).reshape(n, c, -1)
    return (flat + w.conv1d(f"{name}.proj_out", mixed, c)).reshape(n, c, *size)


def _spatial_transformer(
    w: Weights, name: str, p: dict[str, Any], x: Tensor, context: Tensor | None, heads: int
) -> Tensor:
    n, c, height, width = x.shape
    h = w.conv(f"{name}.proj_in", w.group_norm(f"{name}.norm", x, 1e-6), c, size=1)
    h = h.flatten(2).transpose(1, 2)  # [N, HW, C]
    for i in range(p.get("transformer_depth", 1)):
        block = f"{name}.transformer_blocks.{i}"
        h = h + _cross_attention(w, f"{block}.attn1", w.layer_norm(f"{block}.norm1", h), None, heads)
        h = h + _cross_attention(w, f"{block}.attn2", w.layer_norm(f"{block}.norm2", h), context, heads)
        value, gate = w.linear(f"{block}.ff.net.0.proj", w.layer_norm(f"{block}.norm3", h), 8 * c).chunk(2, -1)
        h = h + w.linear(f"{block}.ff.net.2", value * F.gelu(gate), c)
    h = h.transpose(1, 2).reshape(n, c, height, width)
    return x + w.conv(f"{name}.proj_out", h, c, size=1)


def _cross_attention(w: Weights, name: str, x: Tensor, context: Tensor | None, heads: int) -> Tensor:
    n, _, c = x.shape
    source = x if context is None else context
    q, k, v = (
        w.linear(f"{name}.to_{part}", tokens, c, bias=False).reshape(n, -1, heads, c // heads).transpose(1, 2)
        for part, tokens in (("q", x), ("k", source), ("v", source))
    )
    weights = (q @ k.transpose(-1, -2) / math.sqrt(c // heads)).softmax(-1)  # [N, heads, queries, keys]
    return w.linear(f"{name}.to_out.0", (weights @ v).transpose(1, 2).reshape(n, -1, c), c)


# ---- the first stage -----------------------------------------------------------------------------------------------


def encode(w: Weights, stage: dict[str, Any], x: Tensor) -> Tensor:
    """first_stage_model.encoder and quant_conv: images -> latents, or mean and log-variance of them."""
    root, d = "first_stage_model", stage["params"]["ddconfig"]
    h, side = w.conv(f"{root}.encoder.conv_in", x, d["ch"]), d["resolution"]
    for level, factor in enumerate(d["ch_mult"]):
        name = f"{root}.encoder.down.{level}"
        for j in range(d["num_res_blocks"]):
            h = _coder_block(w, f"{name}.block.{j}", h, d["ch"] * factor)
            if side in d["attn_resolutions"]:
                h = _coder_attention(w, f"{name}.attn.{j}", h)
        if level < len(d["ch_mult"]) - 1:
            h = w.conv(f"{name}.downsample.conv", F.pad(h, (0, 1, 0, 1)), h.shape[1], stride=2, padding=0)
            side //= 2
    h = _coder_middle(w, f"{root}.encoder.mid", h)
    twice = 2 if d["double_z"] else 1
    h = w.conv(
        f"{root}.encoder.conv_out", F.silu(w.group_norm(f"{root}.encoder.norm_out", h, 1e-6)), twice * d["z_channels"]
    )
    return w.conv(f"{root}.quant_conv", h, twice * stage["params"]["embed_dim"], size=1)


def decode(w: Weights, stage: dict[str, Any], z: Tensor) -> Tensor:
    """The codebook for a VQ model, post_quant_conv, first_stage_model.decoder: latents -> images."""
    root, d = "first_stage_model", stage["params"]["ddconfig"]
    if stage["target"].endswith("VQModelInterface"):
        codes = w.get_or_draw(f"{root}.quantize.embedding.weight", (stage["params"]["n_embed"], z.shape[1]), std=1.0)
        pixels = z.permute(0, 2, 3, 1)
        nearest = (pixels[..., None, :] - codes).square().sum(-1).argmin(-1)
        z = codes[nearest].permute(0, 3, 1, 2)
    h = w.conv(f"{root}.post_quant_conv", z, d["z_channels"], size=1)
    h = w.conv(f"{root}.decoder.conv_in", h, d["ch"] * d["ch_mult"][-1])
    h = _coder_middle(w, f"{root}.decoder.mid", h)
    side = d["resolution"] // 2 ** (len(d["ch_mult"]) - 1)
    for level, factor in reversed(list(enumerate(d["ch_mult"]))):
        name = f"{root}.decoder.up.{level}"
        for j in range(d["num_res_blocks"] + 1):
            h = _coder_block(w, f"{name}.block.{j}", h, d["ch"] * factor)
            if side in d["attn_resolutions"]:
                h = _coder_attention(w, f"{name}.attn.{j}", h)
        if level > 0:
            h = w.conv(f"{name}.upsample.conv", _double(h), h.shape[1])
            side *= 2
    return w.conv(f"{root}.decoder.conv_out", F.silu(w.group_norm(f"{root}.decoder.norm_out", h, 1e-6)), d["out_ch"])


def _coder_middle(w: Weights, name: str, h: Tensor) -> Tensor:
    h = _coder_attention(w, f"{name}.attn_1", _coder_block(w, f"{name}.block_1", h, h.shape[1]))
    return _coder_block(w, f"{name}.block_2", h, h.shape[1])


def _coder_block(w: Weights, name: str, x: Tensor, out: int) -> Tensor:
    h = w.conv(f"{name}.conv1", F.silu(w.group_norm(f"{name}.norm1", x, 1e-6)), out)
    h = w.conv(f"{name}.conv2", F.silu(w.group_norm(f"{name}.norm2", h, 1e-6)), out)
    return h + (x if x.shape[1] == out else w.conv(f"{name}.nin_shortcut", x, out, size=1))


def _coder_attention(w: Weights, name: str, x: Tensor) -> Tensor:
    n, c, *size = x.shape
    h = w.group_norm(f"{name}.norm", x, 1e-6)
    q, k, v = (w.conv(f"{name}.{part}", h, c, size=1).flatten(2) for part in "qkv")  # [N, C, HW]
    weights = (q.transpose(1, 2) @ k / math.sqrt(c)).softmax(-1)  # [N, queries, keys]
    mixed = (v @ weights.transpose(1, 2)).reshape(n, c, *size)
    return x + w.conv(f"{name}.proj_out", mixed, c, size=1)


# ---- whole checkpoints ---------------------------------------------------------------------------------------------


def tiny_config(kind: str, **unet_options: Any) -> dict[str, Any]:
    """A configuration in the original structure, in miniature: `imagenet`, `bedroom` or `church`."""
    latent = 4 if kind == "church" else 3
    unet_params: dict[str, Any] = {
        "image_size": 8,
        "in_channels": latent,
        "out_channels": latent,
        "model_channels": 32,
        "num_res_blocks": 1,
        **{
            "imagenet": {
                "attention_resolutions": [2],
                "channel_mult": [1, 2],
                "num_heads": 2,
                "use_spatial_transformer": True,
                "transformer_depth": 1,
                "context_dim": 24,
            },
            "bedroom": {"attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 16},
            "church": {
                "attention_resolutions": [1, 2],
                "channel_mult": [1, 2, 2],
                "num_heads": 4,
                "use_scale_shift_norm": True,
                "resblock_updown": True,
            },
        }[kind],
        **unet_options,
    }
    coder = {
        "double_z": kind == "church",
        "z_channels": latent,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    stage: dict[str, Any] = {"embed_dim": latent, "ddconfig": coder, "lossconfig": {"target": "torch.nn.Identity"}}
    if kind != "church":
        stage["n_embed"] = 32
    condition: Any = "__is_unconditional__"
    if kind == "imagenet":
        condition = {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"n_classes": 8, "embed_dim": 24, "key": "class_label"},
        }
    return {
        "model": {
            "base_learning_rate": 1e-4,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.0015,
                "linear_end": 0.0155 if kind == "church" else 0.0195,
                "timesteps": 1000,
                "monitor": "val/loss",
                "scale_by_std": kind == "church",
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet_params},
                "first_stage_config": {
                    "target": f"ldm.models.autoencoder.{'AutoencoderKL' if kind == 'church' else 'VQModelInterface'}",
                    "params": stage,
                },
                "cond_stage_config": condition,
            },
        },
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 48}},
    }


def save_config(config: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@torch.no_grad()
def make_checkpoint(config: dict[str, Any], *, ema: bool = False, coder: bool = True) -> Weights:
    """The full set of keys of a checkpoint with seeded weights: every module, the schedule, averages if asked for."""
    params, w = config["model"]["params"], Weights()
    p, stage = params["unet_config"]["params"], params["first_stage_config"]
    side, context = 2 ** len(p["channel_mult"]), None
    if (condition := params["cond_stage_config"]) != "__is_unconditional__":
        options = condition["params"]
        shape = (options["n_classes"], options["embed_dim"])
        context = w.get_or_draw("cond_stage_model.embedding.weight", shape, std=1.0)[:1, None]
    unet(w, p, torch.zeros(1, p["in_channels"], side, side), torch.zeros(1), context)
    if coder:
        d = stage["params"]["ddconfig"]
        encode(w, stage, torch.zeros(1, d["in_channels"], *[2 ** len(d["ch_mult"])] * 2))
        decode(w, stage, torch.zeros(1, stage["params"]["embed_dim"], 2, 2))
    if ema:
        for name in [name for name in w if name.startswith("model.")]:
            short = name.removeprefix("model.").replace(".", "")
            w[f"model_ema.{short}"] = 0.9 * w[name]
        w["model_ema.decay"], w["model_ema.num_updates"] = torch.tensor(0.9999), torch.tensor(7, dtype=torch.int)
    steps = torch.linspace(params["linear_start"] ** 0.5, params["linear_end"] ** 0.5, 1000, dtype=torch.float64)
    w["betas"] = (steps**2).float()
    w["alphas_cumprod"] = (1 - steps**2).cumprod(0).float()
    w["logvar"] = torch.zeros(1000)
    if params["scale_by_std"]:
        w["scale_factor"] = torch.tensor(0.22)
    w.frozen = True
    return w
