"""Sampling by seed: what an image depends on, and what is refused."""

from typing import Any

import pytest
import torch

from hqc.errors import EvaluationError
from hqc.evaluation.sampling import MAX_SEED, Samples, SamplingProtocol, describe_seeds, sample_images

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.5, "eta": 0.5, "batch_size": 4}


def test_image_depends_on_its_seed_and_label_only(pipe: Any) -> None:
    together = sample_images(pipe, [3, 7, 7, 1, 0], [10, 11, 12, 13, 14], **OPTIONS)
    alone = sample_images(pipe, [7], [12], **{**OPTIONS, "batch_size": 1})
    assert torch.equal(together.images[2:3], alone.images)
    assert torch.equal(together.latents[2:3], alone.latents)
    assert not torch.equal(together.images[1], together.images[2])  # other seed
    other_label = sample_images(pipe, [8], [12], **OPTIONS)
    assert not torch.equal(other_label.images, alone.images)


def test_images_are_the_decoded_latents_of_one_run(pipe: Any) -> None:
    samples = sample_images(pipe, [1, 2], [5, 6], **OPTIONS)
    assert len(pipe.calls) == 1
    assert samples.images.shape == (2, 1, 32, 32)
    assert samples.latents.shape == (2, 3, 8, 8)
    expected = torch.tanh((samples.latents / 0.5).mean(1)) / 2 + 0.5  # [2, 8, 8]
    torch.testing.assert_close(samples.images[:, 0, ::4, ::4], expected, rtol=0, atol=1e-6)  # float32 rounding
    assert not samples.images.is_inference()


def test_batches_cover_all_images_and_progress_is_told(pipe: Any) -> None:
    told: list[tuple[int, int]] = []
    sample_images(
        pipe,
        list(range(5)),
        list(range(5)),
        **{**OPTIONS, "batch_size": 2},
        progress=lambda *p: told.append(p),
    )
    assert [call["labels"] for call in pipe.calls] == [[0, 1], [2, 3], [4]]
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_protocol_is_recorded(pipe: Any) -> None:
    protocol = sample_images(pipe, [1], [MAX_SEED], **OPTIONS).protocol
    assert protocol == SamplingProtocol("SimpleNamespace", 2, 1.5, 0.5)
    assert protocol.describe() == "SimpleNamespace, 2 steps, guidance 1.5, eta 0.5"


def test_progress_bar_setting_comes_back(pipe: Any) -> None:
    seen: list[dict[str, Any]] = []
    pipe._progress_bar_config = {"leave": False}

    def configure(**config: Any) -> None:
        pipe._progress_bar_config = config
        seen.append(config)

    pipe.set_progress_bar_config = configure
    sample_images(pipe, [1], [1], **OPTIONS)
    assert seen == [{"leave": False, "disable": True}, {"leave": False}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": []}, "0 labels"),
        ({"seeds": [1, 2]}, "1 labels and 2 seeds"),
        ({"seeds": [-1]}, "seed outside"),
        ({"seeds": [MAX_SEED + 1]}, "seed outside"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": -0.1}, "guidance_scale=-0.1"),
        ({"eta": 1.5}, "eta=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_values_out_of_range_are_refused(pipe: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        sample_images(pipe, **{"labels": [1], "seeds": [1], **OPTIONS, **change})
    assert pipe.calls == []


def test_all_violations_are_told_at_once(pipe: Any) -> None:
    with pytest.raises(EvaluationError, match=r"eta=2.*batch_size=0"):
        sample_images(pipe, [1], [1], **{**OPTIONS, "eta": 2, "batch_size": 0})


def test_broken_model_is_named(pipe: Any) -> None:
    pipe.gain = float("nan")
    with pytest.raises(EvaluationError, match=r"2 of 2 images .* label 4 with seed 9"):
        sample_images(pipe, [4, 5], [9, 10], **OPTIONS)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 8, 8), (1,)),
        (torch.zeros(2, 8, 8), (1, 2)),
        (torch.full((2, 1, 8, 8), 1.01), (1, 2)),
    ],
    ids=["labels missing", "3-D", "above 1"],
)
def test_inconsistent_samples_are_refused(images: torch.Tensor, labels: tuple[int, ...]) -> None:
    with pytest.raises(EvaluationError):
        Samples(images, torch.zeros(2, 3, 2, 2), labels, (1, 2), SamplingProtocol("DDIM", 1, 1.0, 0.0))


@pytest.mark.parametrize(
    ("seeds", "text"),
    [
        (range(100), "0..99"),
        ([7], "7"),
        ([3, 1], "3, 1"),
        (range(0, 20, 2), "10 seeds, sha256 6896e8e6f3fc"),
    ],
)
def test_describe_seeds(seeds: Any, text: str) -> None:
    assert describe_seeds(list(seeds)) == text


def test_samples_without_guidance_are_comparable_whatever_the_scale(pipe: Any) -> None:
    options = [OPTIONS | {"guidance_scale": g} for g in (0.0, 0.5, 1.0)]
    protocols = {sample_images(pipe, [1], [2], **option).protocol for option in options}
    assert [protocol.guidance_scale for protocol in protocols] == [1.0]


def test_long_seed_lists_that_differ_read_differently() -> None:
    assert describe_seeds([0, *range(2, 20)]) != describe_seeds([1, *range(3, 21)])


def test_real_pipeline_decodes_to_its_own_pt_output() -> None:
    """A tiny untrained pipeline: `sample_images` must agree with output_type="pt"."""
    diffusers = pytest.importorskip("diffusers")
    ldm = pytest.importorskip("hqc.models.ldm")
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 8, "layers_per_block": 1}
    pipe = ldm.ClassConditionalLDMPipeline(
        vae=diffusers.AutoencoderKL(
            in_channels=1,
            out_channels=1,
            latent_channels=3,
            scaling_factor=0.7,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **blocks,
        ),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **blocks,
        ),
        scheduler=diffusers.DDIMScheduler(num_train_timesteps=20),
        class_embedder=ldm.ClassEmbedder(dim=8),
    )
    samples = sample_images(pipe, [2, 9, 2], [1, 2, 3], **OPTIONS)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    pipe.set_progress_bar_config(disable=True)
    images = pipe([2, 9, 2], 2, 1.5, 0.5, generators, output_type="pt").images
    torch.testing.assert_close(samples.images, images, rtol=0, atol=0)
    alone = sample_images(pipe, [9], [2], **OPTIONS)
    torch.testing.assert_close(samples.images[1:2], alone.images, rtol=0, atol=1e-5)  # batched float32 sums
    assert samples.protocol.sampler == "DDIMScheduler"
