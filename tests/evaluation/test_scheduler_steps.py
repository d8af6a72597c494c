"""What goes into a scheduler's step and what comes out, changed and put back."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from hqc.errors import EvaluationError
from hqc.evaluation.scheduler_steps import changed_steps

X, NOISE = torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), 0.5)


def scheduler() -> Any:
    made = DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    made.set_timesteps(4)
    return made


@pytest.mark.parametrize("return_dict", [False, True])
def test_noise_goes_in_changed_and_latents_come_out_changed(return_dict: bool) -> None:
    ddim, seen = scheduler(), []
    wanted = ddim.step(3 * NOISE, 50, X).prev_sample - 1

    def noise(timestep: float, predicted: Tensor) -> Tensor:
        seen.append((timestep, float(predicted.mean())))
        return 3 * predicted

    with changed_steps(ddim, noise=noise, latents=lambda x: x - 1):
        result = ddim.step(NOISE, 50, sample=X, return_dict=return_dict)
    torch.testing.assert_close(result[0], wanted)
    if return_dict:
        torch.testing.assert_close(result.prev_sample, wanted)
    assert seen == [(50.0, 0.5)]


def test_a_learned_variance_stays_as_it_is() -> None:
    given: list[Tensor] = []

    class Learned:
        def step(self, model_output: Tensor, timestep: int, sample: Tensor) -> tuple[Tensor]:
            given.append(model_output)
            return (sample,)

    learned, seen = Learned(), []
    output = torch.cat([NOISE, torch.full_like(NOISE, 7.0)], dim=1)

    def noise(timestep: float, predicted: Tensor) -> Tensor:
        seen.append(predicted.shape)
        return 2 * predicted

    with changed_steps(learned, noise=noise):
        learned.step(output, 1, X)
    assert seen == [NOISE.shape]
    assert given[0].flatten().tolist() == [1.0, 1.0, 7.0, 7.0]
    assert output.flatten().tolist() == [0.5, 0.5, 7.0, 7.0]  # the denoiser's own output is not written into


def test_the_step_is_as_before_afterwards_and_keeps_its_signature() -> None:
    ddim = scheduler()
    before, plain = inspect.signature(ddim.step), ddim.step(NOISE, 50, X).prev_sample

    def fail() -> None:
        with changed_steps(ddim, latents=lambda x: x + 1):
            assert inspect.signature(ddim.step) == before  # pipelines look for eta and generator in it
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert "step" not in vars(ddim)
    assert bool((ddim.step(NOISE, 50, X).prev_sample == plain).all())


def test_changes_nest() -> None:
    ddim = scheduler()
    wanted = ddim.step(NOISE, 50, X).prev_sample + 11
    with changed_steps(ddim, latents=lambda x: x + 1):
        with changed_steps(ddim, latents=lambda x: x + 10):
            torch.testing.assert_close(ddim.step(NOISE, 50, X).prev_sample, wanted)
        torch.testing.assert_close(ddim.step(NOISE, 50, X).prev_sample, wanted - 10)


@pytest.mark.parametrize("odd", [SimpleNamespace(), SimpleNamespace(step=lambda x: x), SimpleNamespace(step=3)])
def test_a_scheduler_of_another_form_is_refused(odd: Any) -> None:
    with pytest.raises(EvaluationError, match=r"has no step\(model_output, timestep, sample"), changed_steps(odd):
        pass
