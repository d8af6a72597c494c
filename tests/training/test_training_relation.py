"""Relations between places as a loss: literal loops, gradients by finite differences, and what the loop gives it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from guided_denoiser import Settings, distil
from torch import Tensor, fx

from hqc.capture import trace
from hqc.capture.sources import Source
from hqc.checkpoint import Checkpoint
from hqc.errors import PlanError
from hqc.program import InputSpec, Origin, Program
from hqc.sampling import Task
from hqc.training import Distil, Group, GuidedNoise, TemporalRelation
from hqc.training.losses import Seen, temporal_relation
from hqc.training.losses.temporal_relation import relation_loss
from hqc.training.taps import Before, Tapped, taps_of


def features(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_loops(student: np.ndarray, teacher: np.ndarray) -> float:
    """Σ_n Σ_i Σ_j p_ij·log(p_ij/p̂_ij), features [N, places, C]."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for i in range(len(ours)):
            rows = []
            for found in (theirs, ours):
                dots = [
                    sum(float(a) * float(b) for a, b in zip(found[i], found[j], strict=True))
                    / math.sqrt(sum(float(a) ** 2 for a in found[i]) * sum(float(a) ** 2 for a in found[j]))
                    for j in range(len(found))
                ]
                norm = sum(math.exp(dot) for dot in dots)
                rows.append([math.exp(dot) / norm for dot in dots])
            total += sum(p * math.log(p / q) for p, q in zip(*rows, strict=True))
    return total


@pytest.mark.parametrize("chunk", [2**22, 24, 1], ids=["at once", "some rows", "row by row"])
def test_the_loss_is_that_of_literal_loops(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporal_relation, "_CHUNK_VALUES", chunk)
    student, teacher = features(2, 5, 3, seed=1), features(2, 5, 3, seed=2)
    assert float(relation_loss(student, teacher)) == pytest.approx(by_loops(student.numpy(), teacher.numpy()), 1e-12)
    assert float(relation_loss(teacher, teacher)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("chunk", [2**22, 24])
def test_the_gradient_is_that_of_finite_differences_and_not_zero(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporal_relation, "_CHUNK_VALUES", chunk)
    student, teacher = features(2, 5, 3, seed=1).requires_grad_(), features(2, 5, 3, seed=2)
    assert torch.autograd.gradcheck(relation_loss, (student, teacher))
    relation_loss(student, teacher).backward()
    assert float(student.grad.abs().min()) > 1e-6


def test_the_gradient_reaches_the_student_through_the_window_and_not_the_teacher() -> None:
    """An image [N, C, H, W], the mean of two steps, times the weight."""
    loss = TemporalRelation(weight=7.0, window=2, scope="block")
    now, past = features(2, 3, 2, 2, seed=1).requires_grad_(), features(2, 3, 2, 2, seed=2)
    other, other_past = features(2, 3, 2, 2, seed=3).requires_grad_(), features(2, 3, 2, 2, seed=4)
    pair = [
        Seen(torch.zeros(1), 2.0, {"block block": a}, ({"block block": torch.zeros_like(b)}, {"block block": b}))
        for a, b in ((now, past), (other, other_past))
    ]
    found = loss(*pair)
    means = [((a + b) / 2).detach().flatten(2).transpose(1, 2).numpy() for a, b in ((now, past), (other, other_past))]
    assert float(found.detach()) == pytest.approx(14 * by_loops(*means), 1e-12)
    found.backward()
    assert other.grad is None
    step, direction = 1e-6, features(2, 3, 2, 2, seed=5)
    moved = [
        float(loss(replace(pair[0], taps={"block block": now.detach() + sign * step * direction}), pair[1]))
        for sign in (1, -1)
    ]
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(float((now.grad * direction).sum()), 1e-6)
    assert float(now.grad.abs().max()) > 1e-3


def test_a_window_of_one_sees_the_present_step() -> None:
    loss, present = TemporalRelation(weight=1.0, window=1), features(1, 4, 3, seed=1)
    seen = Seen(torch.zeros(1), None, {"block ": present}, ({"block ": present + 1},))
    other = Seen(torch.zeros(1), None, {"block ": features(1, 4, 3, seed=2)})
    expected = by_loops(present.numpy(), other.taps["block "].numpy())
    assert float(loss(seen, other)) == pytest.approx(expected, 1e-12)


# ---- taps ------------------------------------------------------------------------------------------------------------


class _Values(fx.Interpreter):
    """Every value by the name of its node."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module())
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n.name] = value = super().run_node(n)
        return value


def inputs(n: int = 2) -> tuple[Tensor, ...]:
    kinds = ((n, 4, 4, 4), (n,), (n, 1, 32))
    sample, timestep, condition = (features(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(kinds))
    return sample, timestep.abs() * 50, condition


def test_taps_are_the_blocks_output_of_both_graphs(teacher: Program, student: Program) -> None:
    """`conv_out` reads it: through its quantiser in the student."""
    loss, sample = TemporalRelation(), inputs()
    for program in (teacher, student):
        (name, node), *_ = taps_of((GuidedNoise(), loss), program).items()
        assert str(next(n for n in program.graph.nodes if n.name == node).target) == "aten.add.Tensor"
        values = _Values(program)
        wanted = values.run(*sample)
        tapped = Tapped(program.module(), {name: node})
        assert torch.equal(tapped(*sample), wanted)
        assert torch.equal(tapped.values[name], values.found[node])
        assert tapped.values[name].shape == (2, 32, 4, 4)


def test_a_block_is_named_by_its_path(teacher: Program) -> None:
    (node,) = TemporalRelation(scope="middle").taps(teacher).values()
    assert dict(teacher.sites())["middle"].name == node
    with pytest.raises(PlanError, match=r"temporal_relation of up_blocks\.9: the program has no such block"):
        TemporalRelation(scope="up_blocks.9").taps(teacher)
    with pytest.raises(PlanError, match="no such block"):
        TemporalRelation(scope="midd").taps(teacher)


def test_a_block_whose_output_is_a_vector_is_refused() -> None:
    class Vectors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(sample)) + timestep.view(-1, 1))

    specs = (InputSpec("sample", ("N", 8)), InputSpec("timestep", ("N",)))
    program = trace(Source(Vectors(), specs, Origin(source="vectors")))
    with pytest.raises(PlanError, match=r"its output is \['N', 8\], no image or tokens. Name another block as scope"):
        TemporalRelation().taps(program)


def test_steps_in_another_order_are_refused() -> None:
    with pytest.raises(PlanError, match=r"its steps are shuffled; temporal_relation sees neighbouring ones"):
        Distil(losses=(GuidedNoise(), TemporalRelation()), groups=(Group("*", 1.0),), order="shuffled")


def test_a_block_that_is_missing_is_refused_before_anything_runs(
    student: Program, teacher: Program, task: Task
) -> None:
    with pytest.raises(PlanError, match="no such block"):
        _distil(student, teacher, task, losses=(TemporalRelation(scope="none"),))


def test_what_was_before_ends_where_a_trajectory_begins() -> None:
    losses = (TemporalRelation(window=3), GuidedNoise())
    before, seen = Before(losses), []
    for epoch, number in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (1, 5)):
        student, teacher = before.begin(epoch)
        seen.append([int(one["x"]) for one in student])
        assert [int(one["x"]) for one in teacher] == [-n for n in seen[-1]]
        before.add({"x": torch.tensor([number])}, {"x": torch.tensor([-number])})
        copy = Before(losses)
        copy.restore(Checkpoint(1, before.snapshot()))
        assert copy.begin(epoch) == before.begin(epoch)
    assert seen == [[], [0], [0, 1], [1, 2], [], [4]]


# ---- training --------------------------------------------------------------------------------------------------------


def _distil(student: Program, teacher: Program, task: Task, *, losses: Any, **more: Any) -> Program:
    settings = Settings(epochs=2, batch_size=2, checkpoint_every=more.pop("every", 200), more={"losses": losses})
    return distil(student, teacher, task, settings, **more)


def test_relations_alone_train_the_site_in_front_of_them(student: Program, teacher: Program, task: Task) -> None:
    updates: list[Any] = []
    result = _distil(student, teacher, task, losses=(TemporalRelation(),), on_step=updates.append)
    assert not torch.equal(result.state["middle.lora_b"], student.state["middle.lora_b"])
    assert all(update.loss > 0 for update in updates)


def test_a_killed_run_goes_on_to_the_same_bits(student: Program, teacher: Program, task: Task) -> None:
    """In the middle of a trajectory, whose step before lies in the checkpoint."""
    losses, saved = (GuidedNoise(), TemporalRelation()), []
    whole = _distil(student, teacher, task, losses=losses, every=2, on_checkpoint=saved.append)
    (first, *_) = saved
    assert first.step == 2
    assert any(name.startswith("tap/0/student/") for name in first.tensors)
    again = _distil(student, teacher, task, losses=losses, resume=first)
    assert all(torch.equal(whole.state[name], tensor) for name, tensor in again.state.items())
    forgetful = Checkpoint(2, {n: t for n, t in first.tensors.items() if not n.startswith("tap/")})
    other = _distil(student, teacher, task, losses=losses, resume=forgetful)
    assert not torch.equal(other.state["middle.lora_b"], whole.state["middle.lora_b"])


def test_without_relations_training_is_what_it_was(student: Program, teacher: Program, task: Task) -> None:
    saved: list[Checkpoint] = []
    _distil(student, teacher, task, losses=(GuidedNoise(),), every=2, on_checkpoint=saved.append)
    assert not [name for name in saved[0].tensors if name.startswith("tap/")]
