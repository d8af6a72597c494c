"""What denoisers are given beside a prompt's encoding: against what diffusers' own pipelines give them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import TOKENS
from text_pipelines import MORE_PIPELINES, text_pipeline
from tiny_pipeline import traced_pipeline
from torch import Tensor, nn

import hqc
from hqc.capture.families import plain_arguments
from hqc.errors import TrainingError
from hqc.program import Program
from hqc.sampling.sources import conditions_of
from hqc.sampling.task import denoiser, trajectory

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
GUIDANCE = 3.0
CALLED: dict[str, dict[str, Any]] = {
    "lcm": {},
    "upscale": {"image": torch.zeros(1, 3, 8, 8)},
    "sd3": {"max_sequence_length": 4},
    "pixart": {"max_sequence_length": TOKENS, "use_resolution_binning": False, "clean_caption": False},
    "flux": {"max_sequence_length": TOKENS},
}


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {name: traced_pipeline(name) for name in MORE_PIPELINES}


def given_by_diffusers(name: str, work: Path) -> dict[str, Tensor]:
    """What the whole pipeline gives its denoiser in the first step, by hqc's names."""
    pipeline, seen = text_pipeline(name, work), dict[str, Tensor]()
    model = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer

    def record(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.update(plain_arguments(type(module).__name__, args, options))

    model.register_forward_pre_hook(record, with_kwargs=True)
    if name == "pixart":
        # diffusers gives the sizes to the model of 1024 pixels alone, which it knows by its latents.
        model.register_to_config(sample_size=128)
    size = {} if name == "upscale" else {"height": 16, "width": 16}
    pipeline("a cat", num_inference_steps=1, guidance_scale=GUIDANCE, output_type="latent", **size, **CALLED[name])
    return seen


@pytest.mark.parametrize("name", MORE_PIPELINES)
def test_conditions_are_those_that_diffusers_gives(name: str, programs: dict[str, Program], tmp_path: Path) -> None:
    program = programs[name]
    task = hqc.task_of(program, prompts=["a cat"], guidance_scale=GUIDANCE)
    seen = given_by_diffusers(name, tmp_path)
    specs = conditions_of(program.inputs)
    drawn = task.draw_conditions(1, torch.Generator())  # type: ignore[misc]
    nothing = task.unconditional(1) if task.unconditional is not None else None
    assert task.distilled is (name in ("lcm", "flux"))
    assert isinstance(drawn, tuple)
    for place, spec in enumerate(specs):
        wanted = seen[spec.name].to(drawn[place].dtype)
        if not spec.batched:
            torch.testing.assert_close(drawn[place], wanted.reshape(drawn[place].shape), rtol=0, atol=0)
            continue
        if nothing is not None and len(wanted) == 2:
            torch.testing.assert_close(nothing[place], wanted[:1], rtol=0, atol=1e-6)
        torch.testing.assert_close(drawn[place], wanted[-1:], rtol=0, atol=1e-6, msg=spec.name)


@pytest.mark.parametrize("name", MORE_PIPELINES)
def test_they_are_sampled(name: str, programs: dict[str, Program]) -> None:
    program = programs[name]
    task = hqc.task_of(program, prompts=["a cat", "b"])
    steps = list(trajectory(task, denoiser(program.module()), 3, 2, GUIDANCE, 0.0, 0))
    assert all(bool(x.isfinite().all()) and len(x) == 3 for x in steps)


def test_guidance_inside_the_model_is_the_pipelines_own_where_none_is_given(programs: dict[str, Program]) -> None:
    def embedding(**options: float) -> Tensor:
        task = hqc.task_of(programs["lcm"], prompts=["b"], **options)
        return task.draw_conditions(1, torch.Generator())[1]  # type: ignore[misc, index, return-value]

    assert torch.equal(embedding(), embedding(guidance_scale=8.5))  # LatentConsistencyModelPipeline's default
    assert not torch.equal(embedding(), embedding(guidance_scale=1.5))


def test_the_noise_level_is_the_pipelines_own(programs: dict[str, Program]) -> None:
    task = hqc.task_of(programs["upscale"], prompts=["b"])
    for conditions in (task.draw_conditions(2, torch.Generator()), task.unconditional(2)):  # type: ignore[misc]
        assert conditions[1].tolist() == [20, 20]  # type: ignore[union-attr, index]
        assert conditions[1].dtype == torch.int64  # type: ignore[union-attr, index]
    assert task.carried == 3


def test_prompts_that_t5_cuts_are_counted(programs: dict[str, Program]) -> None:
    assert "1 of them longer" in hqc.task_of(programs["pixart"], prompts=["a cat", "b"]).drawn_from


def test_labels_that_are_no_noise_level_are_refused(programs: dict[str, Program], tmp_path: Path) -> None:
    pipeline = text_pipeline("lcm", tmp_path)  # its call has no noise level
    with pytest.raises(TrainingError, match="class_labels: is no noise level"):
        hqc.task_of(programs["upscale"], pipeline, prompts=["b"])
