"""Gain and cosine by timestep against a literal numpy loop over DDIM's formula."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from step_pipeline import SHAPE, StepPipeline, first_latents
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.gain import Gain
from hqc.evaluation.trajectory_fidelity import TrajectoryFidelity, trajectory_fidelity

Array = NDArray[np.float64]
LABELS, SEEDS = [1, 2, 1, 2, 1], [30, 4, 5, 60, 7]
SAMPLER: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 2.5, "eta": 0.0}
STEP, G = 16, 2.5  # 100 timesteps in 6 steps


def weight(seed: int) -> Tensor:
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))


FLOAT, QUANTISED = weight(1), weight(1) + 0.2 * weight(2)


def denoiser(matrix: Tensor) -> Any:
    def noise(x: Tensor, t: float, labels: Tensor) -> Tensor:
        mixed = torch.einsum("oc,nchw->nohw", matrix, x)
        return torch.tanh(mixed) + t / 100 * labels[:, None, None, None]

    return noise


def pipeline(matrix: Tensor) -> StepPipeline:
    return StepPipeline(denoiser(matrix), DDIMScheduler(num_train_timesteps=100, clip_sample=False))


def literal() -> tuple[list[float], float, list[float]]:
    """k by timestep, k over all, mean cosine after each step: image by image, step by step."""
    config = DDIMScheduler(num_train_timesteps=100).alphas_cumprod.double().numpy()

    def noise(matrix: Array, x: Array, t: int, label: int) -> Array:
        null = np.zeros_like(x)
        wanted = np.zeros_like(x)
        for row in range(4):
            for column in range(4):
                null[:, row, column] = np.tanh(matrix @ x[:, row, column])
                wanted[:, row, column] = np.tanh(matrix @ x[:, row, column]) + t / 100 * label
        return null + G * (wanted - null)

    def step(x: Array, e: Array, t: int) -> Array:
        now, then = config[t], config[t - STEP] if t >= STEP else 1.0
        return np.sqrt(then) * (x - np.sqrt(1 - now) * e) / np.sqrt(now) + np.sqrt(1 - then) * e

    w, w_hat = FLOAT.double().numpy(), QUANTISED.double().numpy()
    times = [5 * STEP, 4 * STEP, 3 * STEP, 2 * STEP, STEP, 0]
    dots, squares, cosines = np.zeros(6), np.zeros(6), np.zeros((6, 5))
    for image, (label, start) in enumerate(zip(LABELS, first_latents(SEEDS).double().numpy(), strict=True)):
        x, x_hat = start, start
        for number, t in enumerate(times):
            e = noise(w, x, t, label)
            dots[number] += (noise(w_hat, x, t, label) * e).sum()
            squares[number] += (e * e).sum()
            x, x_hat = step(x, e, t), step(x_hat, noise(w_hat, x_hat, t, label), t)
            cosines[number, image] = (x * x_hat).sum() / np.sqrt((x * x).sum() * (x_hat * x_hat).sum())
    return (dots / squares).tolist(), float(dots.sum() / squares.sum()), cosines.mean(1).tolist()


@pytest.mark.parametrize("batch_size", [2, 5])
def test_against_the_literal_loop(batch_size: int) -> None:
    calls: list[tuple[int, int]] = []
    found = trajectory_fidelity(
        pipeline(QUANTISED),
        pipeline(FLOAT),
        LABELS,
        SEEDS,
        batch_size=batch_size,
        progress=lambda done, total: calls.append((done, total)),
        **SAMPLER,
    )
    gains, overall, cosines = literal()
    assert found.gain.timesteps == (80.0, 64.0, 48.0, 32.0, 16.0, 0.0)
    assert found.gain.by_timestep == pytest.approx(gains, rel=1e-5)
    assert found.gain.overall == pytest.approx(overall, rel=1e-5)
    assert found.cosine_by_timestep == pytest.approx(cosines, rel=1e-5)
    assert found.mean_cosine == pytest.approx(np.mean(cosines), rel=1e-5)
    assert found.least_cosine == pytest.approx(min(cosines), rel=1e-5)
    assert max(gains) - min(gains) > 0.01
    assert min(cosines) < 0.998
    assert (found.num_images, found.seeds) == (5, "30, 4, 5, 60, 7")
    assert calls[-1] == (15, 15)
    assert len(calls) == 3 * -(-5 // batch_size)


def test_a_model_against_itself_with_noise_in_every_step() -> None:
    pipe = StepPipeline(denoiser(FLOAT), DDIMScheduler(num_train_timesteps=100, clip_sample=False), return_dict=True)
    found = trajectory_fidelity(pipe, pipe, LABELS, SEEDS, batch_size=3, **{**SAMPLER, "eta": 1.0})
    assert found.gain.by_timestep == (1.0,) * 6
    assert found.cosine_by_timestep == pytest.approx((1.0,) * 6, abs=1e-12)


def test_json() -> None:
    found = TrajectoryFidelity(Gain((9.0, 1.0), (1.5, float("nan")), 1.5), (0.9, 0.7), 4, "0..3")
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == {
        "num_images": 4,
        "seeds": "0..3",
        "gain": 1.5,
        "latent_cosine_mean": pytest.approx(0.8),
        "latent_cosine_least": 0.7,
        "timesteps": [9.0, 1.0],
        "gain_by_timestep": [1.5, None],
        "latent_cosine_by_timestep": [0.9, 0.7],
    }


@pytest.mark.parametrize(("labels", "batch_size"), [([], 2), ([1], 2), (LABELS, 0)])
def test_a_request_that_makes_no_sense_is_refused(labels: list[int], batch_size: int) -> None:
    seeds = SEEDS if labels else []
    with pytest.raises(EvaluationError, match=f"found {len(labels)} labels, {len(seeds)} seeds"):
        trajectory_fidelity(pipeline(FLOAT), pipeline(FLOAT), labels, seeds, batch_size=batch_size, **SAMPLER)
    assert first_latents([0]).shape[1:] == SHAPE
