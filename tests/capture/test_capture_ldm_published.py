"""The options of the published latent-diffusion models: read, and built at their size without weights."""

from pathlib import Path

import pytest
import torch
import yaml

from hqc.capture.architectures import empty_architecture
from hqc.capture.ldm.config import read_config
from hqc.capture.ldm.first_stage import build_scheduler, build_vae
from hqc.capture.ldm.unet import build_unet

_VQ_F4 = """
    first_stage_config:
      target: ldm.models.autoencoder.VQModelInterface
      params:
        embed_dim: 3
        n_embed: 8192
        ddconfig:
          double_z: false
          z_channels: 3
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult: [1, 2, 4]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
"""
_UNCONDITIONAL_LDM4 = f"""
model:
  base_learning_rate: 2.0e-06
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.0015
    linear_end: 0.0195
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: image
    cond_stage_key: class_label
    image_size: 64
    channels: 3
    cond_stage_trainable: false
    concat_mode: false
    monitor: val/loss
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 64
        in_channels: 3
        out_channels: 3
        model_channels: 224
        attention_resolutions: [8, 4, 2]
        num_res_blocks: 2
        channel_mult: [1, 2, 3, 4]
        num_head_channels: 32
{_VQ_F4}
    cond_stage_config: __is_unconditional__
"""
CELEBA_HQ = (
    _UNCONDITIONAL_LDM4
    + """
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 48
    train:
      target: taming.data.faceshq.CelebAHQTrain
      params:
        size: 256
lightning:
  trainer:
    benchmark: true
"""
)
BEDROOM = _UNCONDITIONAL_LDM4 + "\ndata:\n  params:\n    train:\n      target: ldm.data.lsun.LSUNBedroomsTrain\n"
IMAGENET = f"""
model:
  base_learning_rate: 0.0001
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.0015
    linear_end: 0.0195
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: image
    cond_stage_key: class_label
    image_size: 64
    channels: 3
    cond_stage_trainable: true
    conditioning_key: crossattn
    monitor: val/loss
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 64
        in_channels: 3
        out_channels: 3
        model_channels: 192
        attention_resolutions: [8, 4, 2]
        num_res_blocks: 2
        channel_mult: [1, 2, 3, 5]
        num_heads: 1
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: 512
{_VQ_F4}
    cond_stage_config:
      target: ldm.modules.encoders.modules.ClassEmbedder
      params:
        n_classes: 1001
        embed_dim: 512
        key: class_label
"""
CHURCH = """
model:
  base_learning_rate: 5.0e-5
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.0015
    linear_end: 0.0155
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    loss_type: l1
    first_stage_key: image
    cond_stage_key: image
    image_size: 32
    channels: 4
    cond_stage_trainable: False
    concat_mode: False
    scale_by_std: True
    monitor: val/loss_simple_ema
    scheduler_config:
      target: ldm.lr_scheduler.LambdaLinearScheduler
      params:
        warm_up_steps: [10000]
        cycle_lengths: [10000000000000]
        f_start: [1.e-6]
        f_max: [1.]
        f_min: [1.]
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: 192
        attention_resolutions: [1, 2, 4, 8]
        num_res_blocks: 2
        channel_mult: [1, 2, 2, 4, 4]
        num_heads: 8
        use_scale_shift_norm: True
        resblock_updown: True
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ckpt_path: models/first_stage_models/kl-f8/model.ckpt
        ddconfig:
          double_z: True
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult: [1, 2, 4, 4]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config: __is_unconditional__
"""
PUBLISHED = {
    "celeba-hq": (CELEBA_HQ, "ldm4-bedroom", 274_056_163),  # the same denoiser as the bedrooms'
    "bedroom": (BEDROOM, "ldm4-bedroom", 274_056_163),
    "imagenet": (IMAGENET, "ldm4-imagenet", 400_920_579),
    "church": (CHURCH, "ldm8-church", 294_966_916),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str, tmp_path: Path) -> None:
    text, architecture, parameters = PUBLISHED[name]
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    config, raw = read_config(tmp_path / "config.yaml"), yaml.safe_load(text)["model"]["params"]
    with torch.device("meta"):
        unet, vae = build_unet(config.unet), build_vae(config, 0.5)
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (unet, empty_architecture(architecture))]
    assert shapes[0] == shapes[1]
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    assert type(vae).__name__ == ("AutoencoderKL" if name == "church" else "VQModel")
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 256 // raw["image_size"]
    assert config.classes is None or config.classes.n_classes == 1001
    assert (config.classes is not None) is (name == "imagenet")
    assert build_scheduler(config).config.beta_end == raw["linear_end"]
