"""The gain of ε, and sampling with it taken out."""

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from step_pipeline import StepPipeline
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.gain import Gain, at_gain_one, gain_of, noise_products
from hqc.evaluation.sampling import sample_images
from hqc.evaluation.trajectories import record

# diffusers hands torch tensors to numpy 2 in its own schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
LABELS, SEEDS = [1, 2, 1], [3, 4, 5]


def small(x: Tensor, t: float, labels: Tensor) -> Tensor:
    return 0.5 * torch.tanh(x) + 0.1 * labels[:, None, None, None]


def louder(x: Tensor, t: float, labels: Tensor) -> Tensor:
    """`small` with a gain that falls from 1.2 to 0.9."""
    return (0.9 + 0.3 * t / 100) * small(x, t, labels)


def test_gain_is_the_least_squares_scale_of_all_batches() -> None:
    torch.manual_seed(0)
    reference = [torch.randn(2, 3, 4, 5, 5) for _ in range(2)]  # two batches of [steps, N, C, H, W]
    scale = torch.tensor([1.5, 0.7])
    found = [scale[:, None, None, None, None] * r + torch.randn_like(r) for r in reference]
    sums = sum(noise_products(list(f), list(r)) for f, r in zip(found, reference, strict=True))
    gain = gain_of((9.0, 1.0), torch.as_tensor(sums))
    a, b = (torch.cat(parts, dim=1).double().flatten(1).numpy() for parts in (found, reference))
    wanted = [float(a[t] @ b[t] / (b[t] @ b[t])) for t in range(2)]
    assert gain.timesteps == (9.0, 1.0)
    assert gain.by_timestep == pytest.approx(wanted, rel=1e-9)
    assert gain.overall == pytest.approx(float((a * b).sum() / (b * b).sum()), rel=1e-9)
    assert gain.by_timestep[0] > 1.2 > gain.by_timestep[1]


def test_a_gain_over_nothing_is_undefined() -> None:
    gain = gain_of((2.0, 1.0), torch.tensor([[0.0, 0.0], [2.0, 1.0]]))
    assert math.isnan(gain.by_timestep[0])
    assert (gain.by_timestep[1], gain.overall) == (2.0, 2.0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_at_gain_one_a_louder_model_draws_what_the_float_model_draws(scheduler: Any) -> None:
    """Its gain is measured along the float model's run, whatever the scheduler keeps from earlier steps."""
    options = {"clip_sample": False} if scheduler is DDIMScheduler else {}
    sampler = {"num_inference_steps": 5, "guidance_scale": 1.5, "eta": 0.0}
    quiet, loud = (StepPipeline(f, scheduler(num_train_timesteps=100, **options)) for f in (small, louder))
    reference = record(quiet, LABELS, SEEDS, **sampler)
    along = record(loud, LABELS, SEEDS, along=reference, **sampler)
    gain = gain_of(reference.timesteps, noise_products(along.noise, reference.noise))
    assert gain.by_timestep == pytest.approx([0.9 + 0.3 * t / 100 for t in reference.timesteps], rel=1e-6)
    wanted = sample_images(quiet, LABELS, SEEDS, batch_size=3, **sampler).images
    plain = sample_images(loud, LABELS, SEEDS, batch_size=3, **sampler).images
    with at_gain_one(loud, gain):  # in two calls of the pipeline
        found = sample_images(loud, LABELS, SEEDS, batch_size=2, **sampler).images
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert float((plain - wanted).abs().max()) > 1e-3
    assert bool((sample_images(loud, LABELS, SEEDS, batch_size=3, **sampler).images == plain).all())


def test_other_steps_than_the_gain_was_measured_at_are_refused() -> None:
    pipe = StepPipeline(small, DDIMScheduler(num_train_timesteps=100, clip_sample=False))
    gain = Gain((75.0, 50.0, 25.0, 0.0), (1.0,) * 4, 1.0)
    with at_gain_one(pipe, gain), pytest.raises(EvaluationError, match="step 1 is at timestep 50, the gain's at 75"):
        sample_images(pipe, LABELS, SEEDS, num_inference_steps=2, guidance_scale=1.5, eta=0.0, batch_size=3)


@pytest.mark.parametrize(
    ("gains", "said"), [((1.0, 0.05), "0.05 at timestep 1"), ((-1.0, math.nan), "nan at timestep 1"), ((-1, 0), "-1")]
)
def test_a_gain_that_is_no_divisor_is_refused(gains: tuple[float, float], said: str) -> None:
    pipe = StepPipeline(small, DDIMScheduler())
    with pytest.raises(EvaluationError, match=f"the gain is {said}"), at_gain_one(pipe, Gain((9.0, 1.0), gains, 1.0)):
        pass
    assert not Gain((9.0, 1.0), gains, 1.0).divides
    assert Gain((9.0, 1.0), (0.1, 5.0), 1.0).divides
