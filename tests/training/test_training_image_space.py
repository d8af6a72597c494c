"""Errors in image space: by the noise levels of the scheduler, in one call or along a trajectory."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from hqc.errors import TrainingError
from hqc.program import Program
from hqc.sampling import Sampler, Task, Work
from hqc.sampling.image_gain import image_gain
from hqc.sampling.one_call import OneCall
from hqc.sampling.task import called_once
from hqc.training import Distil, Group, GuidedNoise, InImageSpace
from hqc.training.losses import Seen


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_gain_is_what_the_scheduler_makes_of_an_error(prediction: str) -> None:
    """Its own x̂_0 of two outputs, one off by d: they differ by gain·d."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(10)
    x, output, off = (torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3))
    for t in scheduler.timesteps[::3]:
        images = [scheduler.step(o, t, x).pred_original_sample for o in (output, output + off)]
        found = image_gain(scheduler, float(t))
        torch.testing.assert_close((images[1] - images[0]).norm(), found * off.norm(), rtol=1e-4, atol=1e-6)


def test_other_schedulers() -> None:
    assert image_gain(FlowMatchEulerDiscreteScheduler(), 250.0) == pytest.approx(0.25)
    assert image_gain(OneCall(), 0.0) == 1.0
    ddim = DDIMScheduler()
    assert image_gain(OneCall(999, ddim), 999) == pytest.approx(image_gain(ddim, 999))
    with pytest.raises(TrainingError, match="x_t holds no image there"):
        image_gain(DDIMScheduler(rescale_betas_zero_snr=True), 999)
    with pytest.raises(TrainingError, match="trained on timesteps 0…999"):
        image_gain(ddim, 1200)


def test_the_loss_weighs_squares_by_the_squared_gain() -> None:
    noise, wanted = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    squares = (noise - wanted).square().flatten(1).sum(1)
    gains, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    found = InImageSpace(weight=2.0)(Seen(noise), Seen(wanted, weights, image_gain=gains))
    torch.testing.assert_close(found, 2 * (squares * gains**2 * weights).sum())
    torch.testing.assert_close(InImageSpace()(Seen(noise), Seen(wanted)), squares.sum())


def _losses(student: Program, teacher: Program, task: Task, sampler: Sampler, loss: Any) -> list[tuple[float, float]]:
    seen: list[tuple[float, float]] = []
    work = Work(teacher, task, sampler, on_update=lambda update: seen.append((update.timestep, update.loss)))
    Distil(losses=(loss,), groups=(Group("*.weight_scale", rate=1e-12, positive=True),), updates=3).run(student, work)
    return seen


def test_training_gives_every_step_its_own_gain(student: Program, teacher: Program, task: Task) -> None:
    sampler = Sampler(num_inference_steps=3, guidance_scale=1.5)
    plain, found = (_losses(student, teacher, task, sampler, loss) for loss in (GuidedNoise(), InImageSpace()))
    scheduler = task.scheduler(3)
    assert len(found) == 3
    for (timestep, before), (_, after) in zip(plain, found, strict=True):
        assert after == pytest.approx(before * image_gain(scheduler, timestep) ** 2, rel=1e-3)


def test_one_call_a_trajectory(student: Program, teacher: Program, task: Task) -> None:
    """Whatever the number of steps: every update is at the timestep, of latents and conditions of its own."""
    found = _losses(student, teacher, task, Sampler(num_inference_steps=4, timestep=60), InImageSpace())
    assert [timestep for timestep, _ in found] == [60.0] * 3
    assert len({loss for _, loss in found}) == 3
    once = called_once(task, 60)
    assert once.timesteps(4) == (60.0,)
    assert called_once(once, 60) is once
    assert called_once(task, None) is task


def test_given_latents_are_what_is_called(teacher: Program, task: Task) -> None:
    """Not noise, and not scaled as the scheduler scales noise."""
    from dataclasses import replace

    given = torch.full((1, 4, 4, 4), 0.3)
    own = replace(task, draw_sample=lambda n, generator: given.expand(n, -1, -1, -1))
    seen: list[torch.Tensor] = []

    def denoise(sample: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor | None) -> torch.Tensor:
        seen.append(sample)
        return torch.zeros_like(sample)

    work = Work(teacher, own, Sampler(num_inference_steps=1, guidance_scale=1.0, timestep=60))
    assert list(work.walk("walking", denoise, 2, 1)) == [0]
    assert len(seen) == 1
    assert torch.equal(seen[0], given.expand(2, -1, -1, -1))


def test_a_timestep_that_the_model_does_not_know(task: Task) -> None:
    with pytest.raises(TrainingError, match=r"sampler.timestep 999: the model was trained on timesteps 0…99"):
        called_once(task, 999)
