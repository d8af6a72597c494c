"""Relations to a queue of the teacher's pixels: literal loops, finite differences, what is queued, resume."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from guided_denoiser import Settings, distil
from torch import Tensor

from hqc.checkpoint import Checkpoint
from hqc.errors import PipelineTextError, PlanError
from hqc.program import Program
from hqc.sampling import Task
from hqc.training import GuidedNoise, QueueRelation
from hqc.training.losses import Seen, queue_relation
from hqc.training.losses.queue_relation import queue_loss
from hqc.training.queue import Queues


def features(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def by_loops(student: np.ndarray, teacher: np.ndarray, queue: np.ndarray) -> float:
    """Σ_i Σ_j p_ij·log(p_ij/p̂_ij), features [P, C], a queue [M, C] of any lengths."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        rows = []
        for found in (theirs, ours):
            cosines = [float(found @ q) / math.sqrt(float(found @ found) * float(q @ q)) for q in queue]
            norm = sum(math.exp(value) for value in cosines)
            rows.append([math.exp(value) / norm for value in cosines])
        total += sum(p * math.log(p / q) for p, q in zip(*rows, strict=True))
    return total


@pytest.mark.parametrize("chunk", [2**22, 14, 1], ids=["at once", "some rows", "row by row"])
def test_the_loss_is_that_of_literal_loops(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_relation, "_CHUNK_VALUES", chunk)
    student, teacher, queue = features(5, 3, seed=1), features(5, 3, seed=2), features(7, 3, seed=3)
    wanted = by_loops(student.numpy(), teacher.numpy(), queue.numpy())
    assert float(queue_loss(student, teacher, unit(queue))) == pytest.approx(wanted, 1e-12)
    assert float(queue_loss(teacher, teacher, unit(queue))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("chunk", [2**22, 14])
def test_the_gradient_is_that_of_finite_differences_and_not_zero(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_relation, "_CHUNK_VALUES", chunk)
    student, teacher = features(5, 3, seed=1).requires_grad_(), features(5, 3, seed=2).requires_grad_()
    queue = unit(features(7, 3, seed=3))
    assert torch.autograd.gradcheck(lambda ours: queue_loss(ours, teacher, queue), (student,))
    queue_loss(student, teacher, queue).backward()
    assert float(student.grad.abs().min()) > 1e-6
    assert teacher.grad is None


def test_it_compares_every_place_of_every_sample_and_weighs() -> None:
    loss = QueueRelation(weight=3.0, scope="block")
    ours, theirs, queue = features(2, 3, 2, 2, seed=1), features(2, 3, 2, 2, seed=2), unit(features(4, 3, seed=3))
    pair = [Seen(torch.zeros(1), 0.5, {loss.key: x}) for x in (ours, theirs)]
    pixels = [x.permute(0, 2, 3, 1).reshape(-1, 3).numpy() for x in (ours, theirs)]
    found = loss(pair[0], replace(pair[1], queue={loss.key: queue}))
    assert float(found) == pytest.approx(1.5 * by_loops(*pixels, queue.numpy()), 1e-12)
    noise = torch.ones(2, requires_grad=True)
    empty = loss(replace(pair[0], noise=noise), pair[1])
    empty.backward()
    assert (float(empty.detach()), noise.grad.tolist()) == (0.0, [0.0, 0.0])


def test_the_queue_is_first_in_first_out_and_gives_near_steps() -> None:
    loss = QueueRelation(queue=6, within=1, pixels=2)
    queues = Queues((GuidedNoise(), loss))
    assert queues.near(0) == {}
    for step in range(4):  # two of three pixels a step, three steps in all
        queues.add({loss.key: torch.eye(4)[step].expand(1, 3, 4) * 5}, step)
    for step, wanted in ((0, [1, 1]), (1, [1, 1, 2, 2]), (2, [1, 1, 2, 2, 3, 3]), (3, [2, 2, 3, 3]), (5, [])):
        assert queues.near(step)[loss.key].argmax(1).tolist() == wanted, step
    assert torch.equal(queues.near(2)[loss.key].norm(dim=1), torch.ones(6))
    copy = Queues((loss,))
    copy.restore(Checkpoint(4, queues.snapshot()))
    for queue in (queues, copy):
        queue.add({loss.key: torch.ones(1, 3, 4)}, 1)
    assert torch.equal(copy.near(2)[loss.key], queues.near(2)[loss.key])


def test_pixels_are_spread_over_samples_and_places() -> None:
    features = torch.arange(2 * 8, dtype=torch.float32).view(2, 8, 1) + 1
    image = torch.cat([features, torch.ones_like(features)], -1).transpose(1, 2).unsqueeze(-1)  # [2, 2, 8, 1]
    chosen = QueueRelation(pixels=4).chosen(image)
    assert (chosen[:, 0] / chosen[:, 1]).round().tolist() == [1, 5, 9, 13]
    assert len(QueueRelation(pixels=400).chosen(image)) == 16


def test_refusals(teacher: Program) -> None:
    with pytest.raises(PipelineTextError, match="option queue is 0"):
        QueueRelation(queue=0)
    with pytest.raises(PlanError, match=r"queue_relation of up_blocks\.9: the program has no such block"):
        QueueRelation(scope="up_blocks.9").taps(teacher)


# ---- training --------------------------------------------------------------------------------------------------------


def _distil(student: Program, teacher: Program, task: Task, *, losses: Any, **more: Any) -> Program:
    settings = Settings(epochs=3, batch_size=2, checkpoint_every=more.pop("every", 200), more={"losses": losses})
    return distil(student, teacher, task, settings, **more)


def test_it_alone_trains_the_site_in_front_of_it(student: Program, teacher: Program, task: Task) -> None:
    updates: list[Any] = []
    losses = (QueueRelation(within=0),)  # the queue has a step again a trajectory later
    result = _distil(student, teacher, task, losses=losses, on_step=updates.append)
    assert not torch.equal(result.state["middle.lora_b"], student.state["middle.lora_b"])
    assert [update.loss > 0 for update in updates] == [False] * 4 + [True] * 8


@pytest.mark.parametrize("saved_at", [2, 6])
def test_a_killed_run_goes_on_to_the_same_bits(student: Program, teacher: Program, task: Task, saved_at: int) -> None:
    """The queue lies in the checkpoint: without it the run goes elsewhere."""
    losses, saved = (GuidedNoise(), QueueRelation(queue=80, within=2, pixels=16)), []
    whole = _distil(student, teacher, task, losses=losses, every=2, on_checkpoint=saved.append)
    (left,) = (checkpoint for checkpoint in saved if checkpoint.step == saved_at)
    kept = {name: len(tensor) for name, tensor in left.tensors.items() if name.startswith("queue/")}
    assert kept == dict.fromkeys(("queue/pixels/queue of the last block", "queue/steps/queue of the last block"),
                                 min(80, 16 * saved_at))  # fmt: skip
    again = _distil(student, teacher, task, losses=losses, resume=left)
    assert all(torch.equal(whole.state[name], tensor) for name, tensor in again.state.items())
    forgetful = Checkpoint(saved_at, {n: t for n, t in left.tensors.items() if not n.startswith("queue/")})
    other = _distil(student, teacher, task, losses=losses, resume=forgetful)
    assert not torch.equal(other.state["middle.lora_b"], whole.state["middle.lora_b"])
