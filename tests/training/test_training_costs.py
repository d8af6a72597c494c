"""What steps cost: samples that really pass the denoiser, counted in its convolutions, a backward pass as two."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from guided_denoiser import task_with
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hqc.capture import capture_module
from hqc.pipeline import Procedure, run_procedure
from hqc.program import InputSpec, Program
from hqc.recipes import RECIPES, Recipe, run
from hqc.recipes.run import Request, run_recipe
from hqc.sampling import Work
from hqc.sampling.sample_set import set_size
from hqc.steps import step_name
from hqc.training import Reconstruct

aten = torch.ops.aten
COUNTED = (16, 16, 3, 3)
"""The weight of both convolutions of the block, the only ones of that shape: all recipes quantise, none splits them."""

FEW: dict[str, dict[str, Any]] = {
    "choose_rotation": {"samples": 1, "timesteps": 1},
    "smooth": {"samples": 1, "timesteps": 1, "rows": 4, "candidates": 2},
    "calibrate_activations": {"samples": 1, "candidates": 3},
    "decompose": {"samples": 1, "timesteps": 1, "rows": 4, "rounds": 2},
    "mix_channel_bits": {"samples": 1, "timesteps": 1, "rows": 4},
    "reconstruct": {"samples": 1, "timesteps": 2, "iterations": 2, "batch_size": 2},
    "distil": {"updates": 4, "batch_size": 2},
    "learn_factors": {"updates": 4, "batch_size": 2},
    "learn_bounds": {"updates": 4, "batch_size": 2},
    "choose_softmax": {"samples": 1},
    "fit_lookup": {"samples": 1, "timesteps": 1, "rows": 4, "rounds": 1},
}
LONG = {"distil", "reconstruct", "learn_factors", "learn_bounds", "decompose", "fit_lookup"}
TRAINING = [name for name, recipe in RECIPES.items() if LONG & {step_name(type(step)) for step in recipe.steps}]


class _Resnet(nn.Module):
    """A block with a time embedding's projection and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.time_emb_proj = nn.Linear(16, 16)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(x)) + self.time_emb_proj(time)[:, :, None, None]
        return x + self.conv2(functional.silu(hidden))


class _Attention(nn.Module):
    """Self-attention over pixels, which are its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = (layer(x).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        return x + functional.scaled_dot_product_attention(*parts).squeeze(1)


class _Denoiser(nn.Module):
    """ε(x, t, c) with one block and one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.time_embedding = nn.Linear(32, 16)
        self.resnets, self.attentions = nn.ModuleList([_Resnet()]), nn.ModuleList([_Attention()])

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        time = self.time_embedding(condition[:, 0] * (1 + timestep.view(-1, 1) / 1000))
        hidden = self.resnets[0](self.conv_in(sample), time)
        tokens = self.attentions[0](hidden.flatten(2).transpose(1, 2))
        return self.conv_out(tokens.transpose(1, 2).unflatten(2, (4, 4)))


class Evaluations(TorchDispatchMode):
    """Samples that pass the counted convolutions, whoever calls them; backward twice."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.convolution.default and tuple(args[1].shape) == COUNTED:
            self.samples += len(args[0])
        if func is aten.convolution_backward.default and tuple(args[2].shape) == COUNTED:
            self.samples += 2 * len(args[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(3)
    sizes = {"sample": ("N", 4, 4, 4), "timestep": ("N",), "condition": ("N", 1, 32)}
    return capture_module(_Denoiser(), tuple(InputSpec(name, size) for name, size in sizes.items()))


def _short(name: str) -> Recipe:
    found = RECIPES[name]
    calls = "num_inference_steps" if found.sampler.timestep is None else "timestep"
    found = found.set(f"sampler.{calls}", 2)
    for step, options in FEW.items():
        found = found.having(step, **options) if found.step(step) is not None else found
    return found


@pytest.mark.parametrize("name", TRAINING)
def test_steps_cost_what_they_run(program: Program, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, float, float, float]] = []

    def counted(current: Program, step: Procedure, work: Work) -> Program:
        with Evaluations() as evaluations:
            result = run_procedure(current, step, work)
        found.append((step_name(type(step)), evaluations.samples / 2, step.cost(current, work), _uncounted(step, work)))
        return result

    monkeypatch.setattr(run, "run_procedure", counted)
    recipe, task = _short(name), task_with(DDIMScheduler)
    request = Request("w4a4", timesteps=task.timesteps(2))
    run_recipe(program, recipe, request, Work(program, task, recipe.sampler))
    assert {step for step, *_ in found} & LONG
    for step, ran, cost, uncounted in found:
        if step == "choose_rotation" or (name, step) == ("quest", "distil"):
            # Not every candidate fits every layer; a loss of one layer's output goes back no further than that layer.
            assert cost / 2 <= ran <= cost
        else:
            assert ran == cost + uncounted, step


def _uncounted(step: Procedure, work: Work) -> int:
    """What `Reconstruct.cost` leaves out, as it says: every unit on all samples, before and after it has learnt."""
    return 2 * set_size(work, step.samples, step.timesteps) * step.rounds if isinstance(step, Reconstruct) else 0
