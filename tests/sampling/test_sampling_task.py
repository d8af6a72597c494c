"""What is sampled: guidance, the trajectory against the sampler's formula, and where random numbers come from."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from hqc.errors import TrainingError
from hqc.sampling import Task, class_conditional_task, guided
from hqc.sampling.task import start, trajectory

# diffusers' multistep samplers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SHAPE = (2, 3, 3)


def _noise(sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
    """A smooth function of everything that a denoiser sees."""
    shift = 0 if condition is None else condition.mean((1, 2)).view(-1, 1, 1, 1)
    return torch.sin(sample + timestep.view(-1, 1, 1, 1) / 100 + shift)


def _task(**options: Any) -> Task:
    return Task(lambda: DDIMScheduler(num_train_timesteps=100), SHAPE, **options)


def _conditional() -> Task:
    return _task(
        draw_conditions=lambda n, generator: torch.full((n, 1, 2), 0.7),
        unconditional=lambda n: torch.full((n, 1, 2), -0.2),
    )


# ---- guidance ------------------------------------------------------------------------------------------------------


def test_guidance_combines_null_and_wanted() -> None:
    """ε_u + g·(ε_c - ε_u) with the null condition first: constants 1 and 3 at g = 2.5 give 6."""
    calls = []

    def denoise(sample: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        calls.append((len(sample), timestep.tolist()))
        assert condition is not None
        return condition[:, 0, :1, None].expand(len(sample), 1, 1)

    conditions = (torch.full((2, 1, 1), 1.0), torch.full((2, 1, 1), 3.0))
    found = guided(denoise, torch.zeros(2, 1, 1), 40.0, conditions, 2.5)
    assert torch.equal(found, torch.full((2, 1, 1), 6.0))
    assert calls == [(4, [40.0] * 4)]


@pytest.mark.parametrize("g", [0.0, 0.5, 1.0])
def test_guidance_up_to_one_runs_the_condition_alone(g: float) -> None:
    """As diffusers' pipelines, which double the batch for g > 1 only; turbo models are documented with 0."""
    calls = []

    def denoise(sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        calls.append(len(sample))
        return condition[:, 0, :1, None].expand(len(sample), 1, 1)

    conditions = (torch.full((2, 1, 1), 1.0), torch.full((2, 1, 1), 3.0))
    assert torch.equal(guided(denoise, torch.zeros(2, 1, 1), 40.0, conditions, g), torch.full((2, 1, 1), 3.0))
    assert calls == [2]
    assert not _conditional().doubles(g)
    assert _conditional().doubles(1.01)


def test_an_unconditional_model_is_called_once_without_condition() -> None:
    seen = []

    def denoise(sample: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        seen.append((len(sample), timestep.tolist(), condition))
        return sample + 1

    found = guided(denoise, torch.zeros(3, 1), 7.0, None, 9.0)
    assert torch.equal(found, torch.ones(3, 1))
    assert seen == [(3, [7.0] * 3, None)]


# ---- the trajectory ------------------------------------------------------------------------------------------------


def _ddim_by_hand(eta: float, g: float, seed: int, n: int, steps: int) -> list[Tensor]:
    """DDIM (arXiv 2010.02502, eq. 12 and 16) in float64 from the linear β of diffusers' defaults."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64), 0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *SHAPE, generator=generator).double()
    stride, visited = 100 // steps, []
    for t in [stride * i for i in reversed(range(steps))]:
        visited.append(x)
        null = _noise(x, torch.full((n,), float(t)), torch.full((n, 1, 2), -0.2))
        wanted = _noise(x, torch.full((n,), float(t)), torch.full((n, 1, 2), 0.7))
        noise = null + g * (wanted - null)
        now, then = alpha_bar[t], alpha_bar[t - stride] if t >= stride else torch.tensor(1.0, dtype=torch.float64)
        x0 = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        x = then.sqrt() * x0 + (1 - then - sigma**2).sqrt() * noise
        if eta > 0:
            x = x + sigma * torch.randn(n, *SHAPE, generator=generator).double()
    return visited


@pytest.mark.parametrize("eta", [0.0, 0.7], ids=["eta 0", "eta 0.7"])
def test_trajectory_is_ddim(eta: float) -> None:
    found = list(trajectory(_conditional(), _noise, 2, 5, 1.5, eta, 17))
    wanted = _ddim_by_hand(eta, 1.5, 17, 2, 5)
    assert len(found) == len(wanted) == 5
    for ours, theirs in zip(found, wanted, strict=True):
        # float32 against float64 over five steps of numbers of order 1.
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], found[-1], atol=0.1, rtol=0)


def test_trajectory_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = torch.stack(list(trajectory(_conditional(), _noise, 2, 4, 1.5, 0.5, 3)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = torch.stack(list(trajectory(_conditional(), _noise, 2, 4, 1.5, 0.5, 3)))
    other = torch.stack(list(trajectory(_conditional(), _noise, 2, 4, 1.5, 0.5, 4)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_trajectory_keeps_no_gradient() -> None:
    weight = torch.ones(1, requires_grad=True)
    last = list(trajectory(_task(), lambda x, t, c: x * weight, 1, 3, 1.0, 0.0, 0))[-1]
    assert not last.requires_grad


@pytest.mark.parametrize(
    "kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]
)
def test_samplers_without_eta_are_called_without_it(kind: Any) -> None:
    made = Task(lambda: kind(num_train_timesteps=100), SHAPE)
    found = torch.stack(list(trajectory(made, _noise, 2, 4, 1.5, 0.5, 3)))
    assert torch.isfinite(found).all()
    assert set(made.timesteps(4)) == {float(t) for t in _timesteps(kind, 4)}


def _timesteps(kind: Any, steps: int) -> Tensor:
    scheduler = kind(num_train_timesteps=100)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


def test_timesteps_ascend() -> None:
    assert _task().timesteps(5) == (0.0, 20.0, 40.0, 60.0, 80.0)


def test_start_draws_the_conditions_and_unit_noise() -> None:
    noise, conditions = start(_conditional(), 400, torch.Generator().manual_seed(0))
    assert noise.shape == (400, *SHAPE)
    # 7200 normal numbers: five standard errors of the mean and of the standard deviation.
    assert abs(float(noise.mean())) < 5 / 7200**0.5
    assert abs(float(noise.std()) - 1) < 5 / (2 * 7200) ** 0.5
    assert conditions is not None
    assert [float(c[0, 0, 0]) for c in conditions] == pytest.approx([-0.2, 0.7])


@pytest.mark.parametrize("given", ["draw_conditions", "unconditional"])
def test_a_task_with_half_of_the_conditions_is_refused(given: str) -> None:
    options = {
        "draw_conditions": lambda n, generator: torch.zeros(n, 1, 2),
        "unconditional": lambda n: torch.zeros(n, 1, 2),
    }
    with pytest.raises(TrainingError, match=r"Task: has .* without .*Give both"):
        _task(**{given: options[given]})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_scheduler_that_makes_nan_is_named_with_its_step(prediction: str) -> None:
    """Zero terminal SNR with ε as prediction divides by zero in diffusers; with v it does not."""
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    scheduler = DDIMScheduler(num_train_timesteps=100, prediction_type=prediction, **options)
    task = Task(lambda: DDIMScheduler.from_config(scheduler.config), SHAPE)
    found = trajectory(task, _noise, 2, 4, 1.0, 0.0, 0)
    if prediction == "v_prediction":
        assert all(bool(x.isfinite().all()) for x in found)
        return
    with pytest.raises(TrainingError) as caught:
        list(found)
    assert str(caught.value).startswith(
        "sampling with DDIMScheduler, step 1 of 4 (timestep 99): the scheduler makes NaN or infinity. "
    )


def test_a_denoiser_that_overflows_is_not_blamed_on_the_scheduler() -> None:
    def overflows(sample: Tensor, timestep: Tensor, condition: None) -> Tensor:
        return sample / (timestep.view(-1, 1, 1, 1) - 50)

    with pytest.raises(TrainingError, match=r"step 2 of 4 \(timestep 50\): the denoiser gives NaN or infinity"):
        list(trajectory(_task(), overflows, 2, 4, 1.0, 0.0, 0))


# ---- class-conditional pipelines -----------------------------------------------------------------------------------


def test_a_pipeline_without_class_embedder_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"SimpleNamespace: has no class embedder.*task=Task\("):
        class_conditional_task(SimpleNamespace(unet=None))


def test_class_conditional_task_draws_every_class_and_never_the_null_class() -> None:
    from hqc.models.ldm import ClassEmbedder

    embedder = ClassEmbedder(num_classes=3, dim=4)
    with torch.no_grad():
        embedder.embedding.weight.copy_(torch.arange(4.0).view(4, 1).expand(4, 4))
    pipeline = SimpleNamespace(
        class_embedder=embedder,
        unet=SimpleNamespace(config={"sample_size": 5, "in_channels": 2}),
        scheduler=DDIMScheduler(num_train_timesteps=50),
    )
    made = class_conditional_task(pipeline)
    assert made.latent_shape == (2, 5, 5)
    assert made.draw_conditions is not None
    assert made.unconditional is not None
    drawn = made.draw_conditions(200, torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 1, 4)
    assert set(drawn[:, 0, 0].tolist()) == {0.0, 1.0, 2.0}
    assert not drawn.requires_grad
    assert torch.equal(made.unconditional(2), torch.full((2, 1, 4), 3.0))
    assert made.new_scheduler().config.num_train_timesteps == 50
    assert made.new_scheduler() is not made.new_scheduler()
