"""The bundled model `digits`: its files, its architecture, and what it is worth."""

import json

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors import safe_open
from torch import Generator, nn

from hqc.models import digits_path
from hqc.models.classifier import FEATURE_DIM

MAX_BYTES = 12_000_000


def modules_of(model, kind):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def test_folder_size_and_kinds_of_files():
    files = [path for path in digits_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} == {".json", ".safetensors", ".png"}


def test_weights_are_float16():
    for path in digits_path().rglob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_folder_loads_in_float32(bundled):
    assert bundled.unet.dtype == bundled.vae.dtype == bundled.class_embedder.dtype == torch.float32
    assert type(bundled.scheduler).__name__ == "DDIMScheduler"
    assert bundled.unet.config.sample_size == 8
    assert bundled.unet.config.in_channels == bundled.unet.config.out_channels == 3


def test_every_kind_of_site_exists(bundled):
    resnets = modules_of(bundled.unet, ResnetBlock2D).values()
    assert any(resnet.conv_shortcut is not None for resnet in resnets)
    assert any(resnet.conv_shortcut is None for resnet in resnets)
    assert any(isinstance(part.conv, nn.Conv2d) for part in modules_of(bundled.unet, Downsample2D).values())
    assert any(isinstance(part.conv, nn.Conv2d) for part in modules_of(bundled.unet, Upsample2D).values())
    attentions = modules_of(bundled.unet, Attention)
    for kind in ("attn1", "attn2"):
        found = [module for name, module in attentions.items() if name.endswith(kind)]
        assert found
        for attention in found:
            parts = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
            assert all(isinstance(part, nn.Linear) for part in parts)
    feed_forwards = modules_of(bundled.unet, FeedForward).values()
    assert feed_forwards
    assert all(isinstance(forward.net[2], nn.Linear) for forward in feed_forwards)


def test_inner_channels_are_multiples_of_32(bundled):
    ends = ("conv_in", "conv_out")
    channels = {
        name: (module.in_channels, module.out_channels)
        for name, module in modules_of(bundled.unet, nn.Conv2d).items()
        if name not in ends
    }
    channels |= {
        name: (module.in_features, module.out_features) for name, module in modules_of(bundled.unet, nn.Linear).items()
    }
    assert len(channels) > 50
    assert {name: pair for name, pair in channels.items() if pair[0] % 32 or pair[1] % 32} == {}


def test_latents_have_unit_variance(bundled, digits):
    with torch.no_grad():
        mean = bundled.vae.encode(digits.test_images).latent_dist.mean
    deviation = float(mean.std() * bundled.vae.config.scaling_factor)
    assert 0.9 < deviation < 1.1


def test_classifier_on_held_out_digits(classifier, digits):
    logits = classifier(digits.test_images)
    accuracy = (logits.argmax(dim=1) == digits.test_labels).float().mean()
    assert accuracy >= 0.98
    assert classifier.features(digits.test_images[:3]).shape == (3, FEATURE_DIM)


def test_autoencoder_on_held_out_digits(bundled, classifier, digits):
    with torch.no_grad():
        decoded = bundled.vae.decode(bundled.vae.encode(digits.test_images).latent_dist.mean).sample
    accuracy = (classifier(decoded).argmax(dim=1) == digits.test_labels).float().mean()
    assert accuracy >= 0.97


def test_generated_digits_are_recognised(bundled, classifier):
    labels = torch.arange(50) % 10
    images = bundled(labels, generator=Generator().manual_seed(7), output_type="pt").images * 2 - 1
    recognised = (classifier(images).argmax(dim=1) == labels).float().mean()
    assert recognised >= 0.9


def test_generated_digits_of_one_class_differ(bundled):
    images = bundled([5] * 8, generator=Generator().manual_seed(7), output_type="pt").images
    distances = torch.cdist(images.flatten(1), images.flatten(1))
    assert (distances + 100 * torch.eye(8)).min() > 1.0


def test_training_report_is_of_a_full_run():
    report = json.loads((digits_path() / "training.json").read_text())
    assert report["stages"]["unet"]["steps"] >= 1000
    assert report["measured"]["classifier_accuracy_held_out"] >= 0.98
