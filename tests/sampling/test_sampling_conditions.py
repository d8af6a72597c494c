"""Tasks of denoisers with several conditions, packed latents, carried channels, flow matching, and pipelines."""

from types import SimpleNamespace

import pytest
import torch
from denoisers import DENOISERS, captured_denoiser, denoiser
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from hqc import api
from hqc.capture import trace
from hqc.errors import TrainingError
from hqc.sampling import Task, guided, synthetic_task
from hqc.sampling.sources import conditions_of
from hqc.sampling.task import advance, start, trajectory
from hqc.sampling.task import denoiser as as_denoise


def test_guidance_of_several_conditions() -> None:
    """Null and wanted of each are joined; what has no batch axis is given as it is."""
    seen = []

    def denoise(sample: Tensor, timestep: Tensor, a: Tensor, places: Tensor, b: Tensor) -> Tensor:
        seen.append((a.shape, places.shape, b.tolist()))
        return sample + a.mean(1)[:, None, None] + b[:, None, None]

    null = (torch.zeros(2, 3), None, torch.tensor([0, 0]))
    wanted = (torch.ones(2, 3), torch.zeros(5, 3), torch.tensor([1, 2]))
    found = guided(denoise, torch.zeros(2, 4, 6), 7.0, (null, wanted), 3.0)
    # null 0; wanted 1 + 1 and 1 + 2; three times that.
    assert found[:, 0, 0].tolist() == [6.0, 9.0]
    assert seen == [((4, 3), (5, 3), [0, 0, 1, 2])]


def test_a_learned_variance_is_left_out() -> None:
    def denoise(sample: Tensor, timestep: Tensor, condition: None) -> Tensor:
        return torch.cat([sample + 1, sample + 100], 1)

    assert torch.equal(guided(denoise, torch.zeros(2, 3, 4, 4), 1.0, None, 1.0), torch.ones(2, 3, 4, 4))


def test_channels_without_noise_are_carried() -> None:
    scheduler = DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    scheduler.set_timesteps(4)
    sample, noise = torch.randn(2, 9, 4, 4), torch.randn(2, 4, 4, 4)
    generator = torch.Generator()
    found = advance(scheduler, noise, scheduler.timesteps[0], sample, 0.0, generator)
    wanted = advance(scheduler, noise, scheduler.timesteps[0], sample[:, :4], 0.0, generator)
    assert torch.equal(found[:, :4], wanted)
    assert torch.equal(found[:, 4:], sample[:, 4:])
    assert not torch.equal(found[:, :4], sample[:, :4])


@pytest.mark.parametrize("name", DENOISERS)
def test_synthetic_tasks_give_what_the_denoiser_takes(name: str) -> None:
    program = captured_denoiser(name)
    task = synthetic_task(program)
    _, conditions = start(task, 2, torch.Generator().manual_seed(0))
    drawn = conditions[1] if isinstance(conditions[1], tuple) else (conditions[1],)
    for spec, value in zip(conditions_of(program.inputs), drawn, strict=True):
        assert list(value.shape) == [2 if d == "N" else d for d in spec.shape]
        assert str(value.dtype) == f"torch.{spec.dtype}"
    steps = list(trajectory(task, as_denoise(program.module()), 2, 3, 1.5, 0.0, 0))
    assert len(steps) == 3
    assert all(torch.isfinite(x).all() and x.shape == steps[0].shape for x in steps)
    assert not torch.equal(steps[0], steps[-1])


def test_null_conditions() -> None:
    def nulls(name: str) -> dict[str, Tensor | None]:
        program = captured_denoiser(name)
        found = synthetic_task(program).unconditional(2)
        names = [spec.name for spec in conditions_of(program.inputs)]
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))

    assert nulls("dit")["class_labels"].tolist() == [1000, 1000]
    sdxl = nulls("sdxl")
    assert not sdxl["text_embeds"].any()
    assert sdxl["time_ids"].tolist() == [[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * 2
    assert nulls("pixart_512")["encoder_attention_mask"].tolist() == [[1] * 5] * 2


def test_flux_is_run_once_with_places_and_times_over_1000() -> None:
    program = captured_denoiser("flux")
    task = synthetic_task(program)
    assert task.distilled
    assert task.unconditional is None
    names = [spec.name for spec in conditions_of(program.inputs)]
    named = dict(zip(names, task.draw_conditions(2, torch.Generator()), strict=True))
    assert named["img_ids"].tolist()[:5] == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 1, 0]]
    assert not named["txt_ids"].any()
    # σ = 1, 2/3, 1/3 shifted: 3σ / (1 + 2σ).
    assert task.timesteps(3) == pytest.approx((0.6, 6 / 7, 1.0), abs=1e-6)
    calls = []
    list(trajectory(task, lambda x, t, *c: calls.append((len(x), float(t[0]))) or x, 2, 3, 5.0, 0.0, 0))
    assert [n for n, _ in calls] == [2, 2, 2]
    assert sorted(t for _, t in calls) == pytest.approx(task.timesteps(3))


def test_a_task_with_conditions_and_no_null_says_that_it_is_distilled() -> None:
    with pytest.raises(TrainingError, match="has draw_conditions without unconditional"):
        Task(DDIMScheduler, (1, 2, 2), lambda n, generator: torch.zeros(n, 1))
    Task(DDIMScheduler, (1, 2, 2), lambda n, generator: torch.zeros(n, 1), distilled=True)


# ---- pipelines -----------------------------------------------------------------------------------------------------


def test_classes_by_number_are_drawn_from_the_pipeline(tmp_path) -> None:
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    DiTPipeline(denoiser("dit"), vae, DDIMScheduler(num_train_timesteps=500)).save_pretrained(tmp_path)
    task = api.task_of(trace(str(tmp_path)))
    assert task.latent_shape == (4, 8, 8)
    assert task.new_scheduler().config.num_train_timesteps == 500
    drawn = task.draw_conditions(2000, torch.Generator().manual_seed(0))
    assert 0 <= int(drawn.min()) < 10 < 990 < int(drawn.max()) <= 999  # never the null class
    assert task.unconditional(2).tolist() == [1000, 1000]


def test_prompts_cannot_be_drawn() -> None:
    pipeline = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(TrainingError, match=r"has no class embedder.*Give --synthetic"):
        api.task_of(captured_denoiser("sd3"), pipeline)


def test_a_shift_that_depends_on_the_number_of_tokens() -> None:
    """mu is linear: 0.5 at 256 tokens, 1.15 at 4096; σ' = e^μ / (e^μ + 1/σ - 1)."""
    import math

    from hqc.sampling.sources import task_settings

    program = captured_denoiser("flux")  # 16 tokens
    task = Task(**task_settings(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), program))
    mu = 0.5 + (16 - 256) * 0.65 / (4096 - 256)
    wanted = sorted(math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in (1.0, 0.5))
    assert task.timesteps(2) == pytest.approx(wanted, abs=1e-6)
