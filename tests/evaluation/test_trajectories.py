"""Runs of a sampler, free and along another run."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from step_pipeline import SHAPE, StepPipeline, first_latents
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.trajectories import Trajectory, latent_cosines, record

SAMPLER = {"num_inference_steps": 4, "guidance_scale": 2.0, "eta": 0.0}
LABELS, SEEDS = [1, 2], [3, 4]


def pipeline(noise: Any, **config: Any) -> Any:
    return StepPipeline(noise, DDIMScheduler(num_train_timesteps=100, clip_sample=False, **config))


def squashed(x: Tensor, t: float, labels: Tensor) -> Tensor:
    return torch.tanh(x) + 0.1 * labels[:, None, None, None]


def test_a_run_is_the_guided_noise_and_the_latents_of_each_step() -> None:
    pipe = pipeline(squashed)
    found = record(pipe, LABELS, SEEDS, **SAMPLER)
    assert found.timesteps == (75.0, 50.0, 25.0, 0.0)
    x, labels = first_latents(SEEDS), torch.tensor(LABELS)
    for number, t in enumerate(pipe.scheduler.timesteps):
        noise = torch.tanh(x) + 2.0 * 0.1 * labels[:, None, None, None]
        x = pipe.scheduler.step(noise, t, x).prev_sample
        torch.testing.assert_close(found.noise[number], noise)
        torch.testing.assert_close(found.latents[number], x)


def test_along_another_run_the_denoiser_is_asked_at_its_points() -> None:
    asked: list[Tensor] = []

    def other(x: Tensor, t: float, labels: Tensor) -> Tensor:
        asked.append(x)
        return 3 * torch.sin(x)

    reference = record(pipeline(squashed), LABELS, SEEDS, **SAMPLER)
    found = record(pipeline(other), LABELS, SEEDS, along=reference, **SAMPLER)
    points = [first_latents(SEEDS), *reference.latents[:-1]]
    for number, point in enumerate(points):
        torch.testing.assert_close(asked[2 * number], point, rtol=0, atol=0)
        torch.testing.assert_close(found.noise[number], 3 * torch.sin(point))
    assert all(bool((a == b).all()) for a, b in zip(found.latents, reference.latents, strict=True))


def test_cosines_are_image_by_image_after_each_step() -> None:
    reference = record(pipeline(squashed), LABELS, SEEDS, **SAMPLER)
    found = record(pipeline(lambda x, t, labels: torch.sin(3 * x)), LABELS, SEEDS, **SAMPLER)
    cosines = latent_cosines(found, reference)
    assert cosines.shape == (4, 2)
    for step in range(4):
        for image in range(2):
            a, b = (run.latents[step][image].double().flatten().numpy() for run in (found, reference))
            assert float(cosines[step, image]) == pytest.approx(float(a @ b / (a @ a) ** 0.5 / (b @ b) ** 0.5))
    assert float(cosines.min()) < 0.999
    torch.testing.assert_close(latent_cosines(found, found), torch.ones(4, 2, dtype=torch.float64))


def test_runs_that_do_not_pair_up_are_refused() -> None:
    reference = record(pipeline(squashed), LABELS, SEEDS, **SAMPLER)
    for steps in (2, 5):
        with pytest.raises(EvaluationError, match="does not pair up with the reference's: step 1 at timestep"):
            record(pipeline(squashed), LABELS, SEEDS, along=reference, **{**SAMPLER, "num_inference_steps": steps})
    longer = Trajectory((*reference.timesteps, -1.0), reference.noise * 2, reference.latents * 2)
    with pytest.raises(EvaluationError, match="4 steps, the reference 5"):
        record(pipeline(squashed), LABELS, SEEDS, along=longer, **SAMPLER)
    shorter = Trajectory(reference.timesteps[:3], reference.noise[:3], reference.latents[:3])
    with pytest.raises(EvaluationError, match="step 4 at timestep 0"):
        record(pipeline(squashed), LABELS, SEEDS, along=shorter, **SAMPLER)
    with pytest.raises(EvaluationError, match=r"latents \[1, 3, 4, 4\], the reference \[2, 3, 4, 4\]"):
        record(pipeline(squashed), LABELS[:1], SEEDS[:1], along=reference, **SAMPLER)
    with pytest.raises(EvaluationError, match="other timesteps"):
        latent_cosines(shorter, reference)
    assert reference.latents[0].shape == (2, *SHAPE)
