"""Sessions inside diffusers: the drop-in UNet with three schedulers, and the pipeline around it."""

import logging

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from hqc.errors import ArtefactError, EvaluationError
from hqc.export import export_program
from hqc.models import digits_path
from hqc.runtimes import as_unet, load
from hqc.storage import save_program

SCHEDULERS = {
    "ddim": DDIMScheduler(num_train_timesteps=1000, steps_offset=1, timestep_spacing="leading"),
    "dpm": DPMSolverMultistepScheduler(num_train_timesteps=1000),
    # Its timesteps are not whole numbers.
    "euler": EulerDiscreteScheduler(num_train_timesteps=1000, timestep_spacing="linspace"),
}


@pytest.fixture(scope="module")
def digits(captured):
    return captured("digits")


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    save_program(digits, root / "digits.hqc")
    export_program(digits, "onnxruntime", root / "with", pipeline=digits_path())
    export_program(digits, "onnxruntime", root / "without")
    return root


def sample(pipeline, scheduler, labels=(3, 7)):
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(list(labels), num_inference_steps=4, generator=generator, output_type="latent").images


# diffusers hands torch tensors to numpy 2 in its own schedulers.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_three_schedulers(folders, scheduler) -> None:
    """The float export draws what the float model draws, step by step through the pipeline."""
    wanted = sample(load("digits").pipeline(), scheduler)
    for name in ("digits.hqc", "with", "without"):
        found = sample(load(folders / name, threads=1).pipeline(), scheduler)
        # Four steps of float32 rounding.
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-4
    assert float((wanted[0] - wanted[1]).norm()) > 1e-2


def test_the_pipeline_goes_with_the_export(folders) -> None:
    inside, reference = load(folders / "with"), load(folders / "without")
    assert inside.pipeline_folder == folders / "with" / "pipeline"
    assert not (folders / "with" / "pipeline" / "unet").exists()
    assert reference.pipeline_folder == digits_path()
    assert type(inside.pipeline()).__name__ == "ClassConditionalLDMPipeline"


def test_images_come_out(folders) -> None:
    pipeline = load(folders / "with", threads=1).pipeline()
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert images[0].size == (32, 32)


def test_a_model_without_pipeline_says_so(captured, tmp_path) -> None:
    export_program(captured("cross_attention"), "onnxruntime", tmp_path / "x")
    with pytest.raises(ArtefactError, match="no pipeline"):
        load(tmp_path / "x").pipeline()


# ---- the drop-in ---------------------------------------------------------------------------------------------------


class Stub:
    """A session that returns what it was given."""

    name = "stub"

    def __init__(self, inputs) -> None:
        self.inputs = inputs

    def __call__(self, sample, timestep, condition=None):
        return sample * 2


@pytest.fixture
def unet(digits):
    return as_unet(Stub(digits.inputs), digits.origin.unet_config, timesteps=(100.0, 900.0))


def test_it_looks_like_a_diffusers_unet(unet) -> None:
    assert (unet.config.in_channels, unet.config["sample_size"], unet.dtype, unet.device.type) == (
        3,
        8,
        torch.float32,
        "cpu",
    )
    assert unet.config.cross_attention_dim == 64
    x = torch.ones(1, 3, 8, 8)
    assert torch.equal(unet(x, 500, x).sample, 2 * x)
    assert torch.equal(unet(x, 500, encoder_hidden_states=x, return_dict=False)[0], 2 * x)
    assert unet(x.double(), 500).sample.dtype == torch.float64


def test_without_the_sources_config_it_has_what_the_shapes_say(captured) -> None:
    unet = as_unet(Stub(captured("cross_attention").inputs), {})
    assert (unet.config.in_channels, unet.config.sample_size, unet.config.cross_attention_dim) == (3, 8, 32)


def test_options_it_does_not_have(unet) -> None:
    x = torch.ones(1, 3, 8, 8)
    unet(x, 500, timestep_cond=None, added_cond_kwargs=None, cross_attention_kwargs={})
    with pytest.raises(EvaluationError, match="timestep_cond"):
        unet(x, 500, timestep_cond=x)


def test_a_timestep_outside_the_calibrated_range_is_noted_once(unet, caplog) -> None:
    x = torch.ones(2, 3, 8, 8)
    with caplog.at_level(logging.WARNING, logger="hqc.runtimes.unet"):
        unet(x, 100)
        unet(x, torch.tensor([900, 500]))
        assert not caplog.records
        unet(x, torch.tensor([500.0, 999.0]))
        unet(x, 1)
    assert len(caplog.records) == 1
    assert "999" in caplog.text
    assert "100…900" in caplog.text
