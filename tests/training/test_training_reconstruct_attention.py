"""Reconstruction within attention: the scales of q, k, v and softmax learn with those of layers, block by block."""

from dataclasses import replace

import pytest
import reconstructed
import torch
from torch import Tensor, nn
from torch.nn import functional

from hqc.calibration import CalibrateActivations, CalibrateWeights
from hqc.capture import capture_module
from hqc.checkpoint import Checkpoint
from hqc.passes import InsertAttentionQdq, InsertQdq, OpenAttention, SelectLayers
from hqc.pipeline import run_pipeline, run_procedure
from hqc.program import InputSpec, Program
from hqc.sampling.sample_set import collect_samples
from hqc.training import Reconstruct

STEP = Reconstruct(learn="activation_scales", samples=4, timesteps=4, iterations=80, batch_size=8, rate=5e-2, seed=2024)
NAME = "attentions.0.attention_{}.activation_scale_table"
TABLES = {NAME.format(part) for part in ("query", "key", "value", "softmax")}


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (layer(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        y = functional.scaled_dot_product_attention(4 * q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out(y).transpose(1, 2).unflatten(-1, x.shape[2:])


class _Denoiser(nn.Module):
    """ε(x, t, c): one block of attention over 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.token, self.attentions = nn.Linear(5, 16), nn.ModuleList([_Attention()])

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        x = self.conv_in(sample) * (1 + (timestep / 1000).view(-1, 1, 1, 1)) + self.token(condition)[:, :, None, None]
        return self.conv_out(self.attentions[0](x))


@pytest.fixture(scope="module")
def selected() -> Program:
    torch.manual_seed(4)
    inputs = (InputSpec("sample", ("N", 3, 4, 4)), InputSpec("timestep", ("N",)), InputSpec("condition", ("N", 5)))
    program = capture_module(_Denoiser(), inputs)
    program = program.evolve(plan=replace(program.plan, keep_float=("conv_*", "token")))
    return run_pipeline(program, [OpenAttention(), SelectLayers(bits="w8a8", rules="all")])


@pytest.fixture(scope="module")
def student(selected: Program) -> Program:
    """Calibrated; then the scales within attention are far larger than they should be, those of layers are not."""
    insert = [InsertQdq(static=True), InsertAttentionQdq(8, "symmetric", static=True)]
    found, work = run_pipeline(selected, insert), reconstructed.work(selected)
    for step in (CalibrateWeights(), CalibrateActivations(samples=4, candidates=20)):
        found = run_procedure(found, step, work)
    assert set(found.state) >= TABLES
    factors = {name: 6 if "softmax" in name else 40 for name in TABLES}
    return found.evolve(state={name: t * factors.get(name, 1) for name, t in found.state.items()})


@torch.no_grad()
def error(program: Program, teacher: Program) -> float:
    """Of the whole, on samples of another seed."""
    held_out = collect_samples(reconstructed.work(teacher), 8, 4, 77, "held out").inputs
    wanted = teacher.module()(*held_out)
    return float((program.module()(*held_out) - wanted).norm() / wanted.norm())


def changed(before: Program, after: Program) -> set[str]:
    return {name for name, tensor in after.state.items() if not torch.equal(tensor, before.state[name])}


def test_all_four_scales_learn_and_the_error_falls(selected: Program, student: Program) -> None:
    found = run_procedure(student, STEP, reconstructed.work(selected))
    assert changed(student, found) >= TABLES
    assert all(name.endswith("activation_scale_table") for name in changed(student, found))
    assert all(bool((found.state[name] < student.state[name]).all()) for name in TABLES)
    # What the scales of layers alone can do: those within attention as they were given.
    layers = found.evolve(state={**found.state, **{name: student.state[name] for name in TABLES}})
    assert error(found, selected) < 0.5 * min(error(layers, selected), error(student, selected))


def test_rounding_leaves_them(selected: Program, student: Program) -> None:
    step = replace(STEP, learn="rounding", iterations=5)
    assert not changed(student, run_procedure(student, step, reconstructed.work(selected))) & TABLES


def test_it_resumes_behind_the_attention(selected: Program, student: Program) -> None:
    step, saved = replace(STEP, iterations=5), list[Checkpoint]()
    whole = run_procedure(student, step, reconstructed.work(selected, on_checkpoint=saved.append))
    kept = [one for one in saved if any(name.endswith(next(iter(TABLES))) for name in one.tensors)]
    assert kept
    again = run_procedure(student, step, reconstructed.work(selected, checkpoint=kept[0]))
    assert changed(whole, again) == set()
    assert changed(student, again) & TABLES
