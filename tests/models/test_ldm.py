"""The contract of the class-conditional pipeline, on the bundled model."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from PIL import Image
from torch import Generator

from hqc.errors import EvaluationError
from hqc.models.ldm import ClassConditionalLDMPipeline, ClassEmbedder

STEPS = 3
# float32 sums in another order over up to 3 steps and a decoder; images in [0, 1].
BATCH_ATOL = 1e-4


class RecordingUNet:
    """The least that the pipeline may ask of a UNet; it predicts zero noise and notes its arguments."""

    dtype = torch.float32
    config = SimpleNamespace(in_channels=3, sample_size=8)

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Size, torch.Tensor, torch.Size]] = []

    def __call__(self, sample, timestep, encoder_hidden_states, return_dict):
        assert return_dict is False
        self.calls.append((sample.shape, timestep, encoder_hidden_states.shape))
        return (torch.zeros_like(sample),)


def test_importing_the_models_package_loads_nothing_heavy():
    code = "import sys, hqc.models; print([m for m in ('torch', 'diffusers', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_class_embedder_gives_one_token_per_label_and_has_an_unconditional_row():
    embedder = ClassEmbedder(num_classes=4, dim=16)
    tokens = embedder(torch.tensor([0, 4]))
    assert tokens.shape == (2, 1, 16)
    assert embedder.unconditional_label == 4
    assert embedder.embedding.num_embeddings == 5


@pytest.mark.parametrize(
    ("output_type", "shape"), [("pt", (2, 1, 32, 32)), ("np", (2, 32, 32, 1)), ("latent", (2, 3, 8, 8))]
)
def test_output_shapes(pipeline, output_type, shape):
    images = pipeline([3, 7], STEPS, generator=Generator().manual_seed(0), output_type=output_type).images
    assert tuple(images.shape) == shape
    assert np.isfinite(np.asarray(images)).all()
    if output_type != "latent":
        assert images.min() >= 0
        assert images.max() <= 1


def test_pil_images_and_tuple(pipeline):
    (images,) = pipeline(5, STEPS, generator=Generator().manual_seed(0), return_dict=False)
    assert [image.size for image in images] == [(32, 32)]
    assert isinstance(images[0], Image.Image)


def test_one_generator_per_image_makes_images_independent_of_the_batch(pipeline):
    def sample(labels, seeds):
        generators = [Generator().manual_seed(seed) for seed in seeds]
        return pipeline(labels, STEPS, generator=generators, output_type="pt").images

    together = sample([1, 2, 3], [10, 11, 12])
    alone = sample([2], [11])
    torch.testing.assert_close(together[1:2], alone, atol=BATCH_ATOL, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_given_latents_replace_the_generator_and_stay_unchanged(pipeline):
    noise = torch.randn(2, 3, 8, 8, generator=Generator().manual_seed(4))
    before = noise.clone()
    given = pipeline([0, 1], STEPS, latents=noise, output_type="latent").images
    drawn = pipeline([0, 1], STEPS, generator=Generator().manual_seed(4), output_type="latent").images
    torch.testing.assert_close(given, drawn, atol=0, rtol=0)
    torch.testing.assert_close(noise, before, atol=0, rtol=0)


def test_eta_adds_noise_from_the_generator(pipeline):
    def sample(eta):
        generator = Generator().manual_seed(0)
        return pipeline([8], STEPS, eta=eta, generator=generator, output_type="latent").images

    torch.testing.assert_close(sample(1.0), sample(1.0), atol=0, rtol=0)
    assert (sample(1.0) - sample(0.0)).abs().max() > 0.1


# diffusers' multistep solver calls np.array on a tensor, which numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize(
    "scheduler_class",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
    ],
)
def test_schedulers_run(pipeline, scheduler_class):
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    images = pipeline([6], 5, generator=[Generator().manual_seed(0)], output_type="pt").images
    assert images.isfinite().all()
    assert images.std() > 0.1  # a digit on a background, not a flat field


@pytest.mark.parametrize(("guidance_scale", "batch"), [(1.5, 6), (1.0, 3), (0.5, 3), (0.0, 3)])
def test_the_unet_is_replaceable_and_called_once_per_step(pipeline, guidance_scale, batch):
    unet = RecordingUNet()
    pipeline.unet = unet
    pipeline([1, 2, 3], STEPS, guidance_scale=guidance_scale, output_type="latent")
    assert len(unet.calls) == STEPS
    for sample_shape, timestep, token_shape in unet.calls:
        assert sample_shape == (batch, 3, 8, 8)
        assert timestep.shape == (batch,)
        assert token_shape == (batch, 1, 64)


def test_guidance_extrapolates_from_the_unconditional_prediction(pipeline):
    class LabelUNet(RecordingUNet):
        """Predicts its token's first element everywhere."""

        def __call__(self, sample, timestep, encoder_hidden_states, return_dict):
            return (encoder_hidden_states[:, :, :1, None].expand_as(sample[:, :1]).expand_as(sample),)

    class NoiseScheduler(DDIMScheduler):
        """Returns the predicted noise itself as the next latent."""

        def step(self, model_output, timestep, sample, return_dict):
            return (model_output,)

    pipeline.unet = LabelUNet()
    pipeline.scheduler = NoiseScheduler.from_config(pipeline.scheduler.config)
    found = pipeline([4], 1, guidance_scale=3.0, output_type="latent").images.unique()
    rows = pipeline.class_embedder.embedding.weight[:, 0]
    torch.testing.assert_close(found, (rows[10] + 3.0 * (rows[4] - rows[10]))[None], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"class_labels": [11]}, "class_labels"),
        ({"class_labels": [-1]}, "class_labels"),
        ({"class_labels": []}, "class_labels"),
        ({"class_labels": [1, 2], "generator": [Generator()]}, "generator"),
        ({"class_labels": [1, 2], "latents": torch.zeros(1, 3, 8, 8)}, "latents"),
    ],
    ids=["label too large", "negative label", "no label", "one generator for two", "one latent for two"],
)
def test_wrong_arguments_are_named(pipeline, arguments, where):
    with pytest.raises(EvaluationError, match=where):
        pipeline(**arguments)


def test_round_trip_through_a_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = ClassConditionalLDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 8, 8, generator=Generator().manual_seed(0))
    found, expected = (p([9], STEPS, latents=noise, output_type="pt").images for p in (loaded, pipeline))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
