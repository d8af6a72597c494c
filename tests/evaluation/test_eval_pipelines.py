"""Images of every kind of pipeline: what it needs, that it gives what diffusers gives, and what cannot be asked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captured_pipelines import captured_pipelines
from text_pipelines import text_pipeline
from tiny_pipeline import IMAGE_PIPELINES
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.gain import Gain, at_gain_one
from hqc.evaluation.metrics import fidelity, fidelity_figures
from hqc.evaluation.needs import needs_of
from hqc.evaluation.sampling import Samples, sample_images
from hqc.evaluation.trajectory_fidelity import trajectory_fidelity
from hqc.needs import Needs

# diffusers hands torch tensors to numpy 2 in its own schedulers; its LDM pipeline is marked as deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]
PROMPTS = ("a cat", "b")


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return captured_pipelines(tmp_path_factory)


def drawn(pipe: Any, labels: list[int], seeds: list[int], batch_size: int = 2, **options: Any) -> Samples:
    needs = needs_of(pipe)
    given = {"num_inference_steps": 2, "guidance_scale": 2.5, "eta": 0.0, **options}
    prompts = PROMPTS if needs.kind == "prompt" else ()
    return sample_images(pipe, labels, seeds, batch_size=batch_size, prompts=prompts, **given)


def as_needed(found: Needs) -> tuple[Any, ...]:
    return found.kind, found.classes, found.size, sorted(found.options), found.digits


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ddpm", ("nothing", 0, (16, 16), [], False)),
        ("ddim", ("nothing", 0, (16, 16), ["eta"], False)),
        ("ldm", ("nothing", 0, (32, 32), ["eta"], False)),
        ("dit", ("class_label", 1000, (16, 16), ["guidance_scale"], False)),
        ("consistency", ("nothing", 0, (16, 16), [], False)),
        ("consistency_classes", ("class_label", 7, (16, 16), [], False)),
        ("sd15", ("prompt", 0, (16, 16), ["eta", "guidance_scale", "negative_prompt"], False)),
        ("sdxl", ("prompt", 0, (16, 16), ["eta", "guidance_scale", "negative_prompt"], False)),
        ("lcm", ("prompt", 0, (16, 16), ["guidance_scale"], False)),
        ("sd3", ("prompt", 0, (16, 16), ["guidance_scale", "negative_prompt"], False)),
        ("pixart", ("prompt", 0, (16, 16), ["eta", "guidance_scale", "negative_prompt"], False)),
        ("flux", ("prompt", 0, (16, 16), ["guidance_scale"], False)),
    ],
)
def test_every_kind_of_pipeline_is_sampled(name: str, wanted: tuple[Any, ...], pipes: Any) -> None:
    pipe = pipes(name)
    needs = needs_of(pipe)
    assert as_needed(needs) == wanted
    samples = drawn(pipe, [0, 1, 1], [5, 6, 7])
    width, height = needs.size
    assert samples.images.shape == (3, 3, height, width)
    assert bool((samples.images[1] != samples.images[2]).any())
    alone = drawn(pipe, [1], [7])
    torch.testing.assert_close(samples.images[2:], alone.images, rtol=0, atol=1e-5)
    assert samples.protocol.guidance_scale == (2.5 if "guidance_scale" in needs.options else 1.0)
    assert samples.labelled is (needs.kind != "nothing")
    if needs.kind != "nothing":
        other = drawn(pipe, [0], [7])
        assert bool((other.images != alone.images).any())
    assert fidelity(samples, samples).identical_images == 3


@pytest.mark.parametrize("name", ["ddpm", "dit", "consistency", "sd15", "lcm", "sd3", "pixart", "flux"])
def test_a_model_follows_itself_through_every_kind_of_pipeline(name: str, pipes: Any) -> None:
    pipe = pipes(name)
    prompts = PROMPTS if needs_of(pipe).kind == "prompt" else ()
    sampler = {"num_inference_steps": 2, "guidance_scale": 2.5, "eta": 0.0, "prompts": prompts}
    found = trajectory_fidelity(pipe, pipe, [0, 1], [5, 6], batch_size=2, **sampler)
    assert len(found.gain.timesteps) == 2
    assert found.gain.by_timestep == (1.0, 1.0)
    assert found.cosine_by_timestep == pytest.approx((1.0, 1.0), abs=1e-12)
    plain = drawn(pipe, [0, 1], [5, 6])
    with at_gain_one(pipe, found.gain):
        assert bool((drawn(pipe, [0, 1], [5, 6]).images == plain.images).all())
    with at_gain_one(pipe, Gain(found.gain.timesteps, (0.5, 0.5), 0.5)):
        assert bool((drawn(pipe, [0, 1], [5, 6]).images != plain.images).any())


@pytest.mark.parametrize("name", ["ddim", "dit", "sd15", "sd3"])
def test_images_are_those_of_diffusers(name: str, pipes: Any, tmp_path: Path) -> None:
    """The same seeds in the pipeline that was traced, with its own denoiser."""
    own = IMAGE_PIPELINES[name]() if name in IMAGE_PIPELINES else text_pipeline(name, tmp_path)
    own.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    size = {"height": 16, "width": 16, "guidance_scale": 2.5}
    asked = {"dit": {"class_labels": [0, 1], "guidance_scale": 2.5}, "ddim": {"batch_size": 2}}
    asked |= {"sd15": {"prompt": list(PROMPTS), **size}}
    asked |= {"sd3": {"prompt": list(PROMPTS), "max_sequence_length": 4, **size}}
    images = own(**asked[name], num_inference_steps=2, generator=generators, output_type="np").images
    wanted = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)
    torch.testing.assert_close(drawn(pipes(name), [0, 1], [5, 6]).images, wanted, rtol=0, atol=1e-4)


def test_latents_are_those_that_the_last_step_left(pipes: Any) -> None:
    pipe = pipes("sd15")
    samples = drawn(pipe, [0], [3])
    assert samples.latents is not None
    decoded: Tensor = pipe.vae.decode(samples.latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(samples.images, (decoded / 2 + 0.5).clamp(0, 1).detach(), rtol=0, atol=1e-5)
    assert drawn(pipes("ddpm"), [0], [3]).latents is None


def test_a_negative_prompt_changes_the_image_and_is_told(pipes: Any) -> None:
    plain, away = (drawn(pipes("sd15"), [0], [3], negative_prompt=text) for text in ("", "b"))
    assert bool((plain.images != away.images).any())
    assert away.protocol.describe().endswith("negative prompt 'b'")
    with pytest.raises(EvaluationError, match="sampler"):
        fidelity(plain, away)


def test_a_pipeline_can_be_called_as_it_is(pipes: Any) -> None:
    """Sizes of new images come from the captured denoiser: `model.pipeline()("a cat")` needs no more."""
    for name in ("sd15", "sdxl", "sd3"):
        options = {"max_sequence_length": 4} if name == "sd3" else {}
        images = pipes(name)("a cat", num_inference_steps=1, output_type="np", **options).images
        assert images.shape == (1, 16, 16, 3)
    assert pipes("dit").get_label_ids(["goldfish"]) == [1]


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_pipelines_that_cannot_be_asked(pipes: Any) -> None:
    with pytest.raises(EvaluationError, match="StableDiffusionUpscalePipeline: needs image, which hqc does not give"):
        needs_of(pipes("upscale"))
    with pytest.raises(EvaluationError, match="DDPMPipeline: gives its denoiser no class_labels"):
        needs_of(pipes("ddpm_classes"))


def test_what_is_asked_must_be_what_it_takes(pipes: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "eta": 0.0, "batch_size": 2}
    with pytest.raises(EvaluationError, match="StableDiffusionPipeline: takes prompts; found 0 prompts"):
        sample_images(pipes("sd15"), [0], [0], **options)
    with pytest.raises(EvaluationError, match="DDPMPipeline: takes no prompts; found 2 prompts"):
        sample_images(pipes("ddpm"), [0], [0], prompts=PROMPTS, **options)
    with pytest.raises(EvaluationError, match="found 2, expected numbers of the 2 prompts"):
        sample_images(pipes("sd15"), [2], [0], prompts=PROMPTS, **options)
    with pytest.raises(EvaluationError, match="class 7: the model has the classes 0 to 6"):
        sample_images(pipes("consistency_classes"), [7], [0], **options)


def test_guidance_of_a_dit_with_other_classes(pipes: Any) -> None:
    pipe = pipes("dit")
    needs = needs_of(pipe)
    assert needs.guides
    few = Needs(needs.pipeline, needs.kind, 10, needs.options, needs.size)
    assert not few.guides
    few.check_guidance(1.0)
    with pytest.raises(EvaluationError, match="null class is 1000, and this model has 10 classes"):
        few.check_guidance(1.5)


def test_figures_of_small_images_without_latents_are_json(pipes: Any) -> None:
    a, b = (drawn(pipes("ddpm"), [0, 0], seeds) for seeds in ([1, 2], [1, 2]))
    small = Samples(a.images[..., :8, :8], None, a.labels, a.seeds, a.protocol, labelled=False)
    figures = fidelity_figures(small, small)
    assert figures["ssim"] is None
    assert figures["latent_cosine"] is None
    assert fidelity_figures(a, b)["ssim"] == pytest.approx(1.0)
