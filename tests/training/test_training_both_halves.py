"""Both halves of guidance as a loss of their own: its value by hand, what it sees, and that it trains."""

from typing import Any

import pytest
import torch
from guided_denoiser import Settings, distil
from torch import Tensor

from hqc.program import Program
from hqc.sampling import Task
from hqc.sampling.task import guided
from hqc.training import BothHalves, GuidedNoise
from hqc.training.losses import Seen
from hqc.training.taps import Tapped, taps_of

KEY = "denoiser output"


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("weight", "of_sample"), [(None, (1, 1)), (3.0, (3, 3)), (torch.tensor([1.0, 5.0]).double(), (1, 5))]
)
def test_it_is_the_squared_error_of_each_half_by_its_samples_weight(weight: Any, of_sample: tuple[int, int]) -> None:
    """Two samples, four rows: without the condition, then with it."""
    ours, theirs = values(4, 3, 2, 2, seed=1), values(4, 3, 2, 2, seed=2)
    noise = torch.zeros(2, 3, 2, 2)
    found = BothHalves(weight=2.0)(Seen(noise, weight, {KEY: ours}), Seen(noise, weight, {KEY: theirs}))
    wanted = 0.0
    for row in range(4):
        wanted += 2 * of_sample[row % 2] * float(((ours[row] - theirs[row]) ** 2).sum())
    assert float(found) == pytest.approx(wanted, 1e-12)


def test_a_predicted_variance_is_not_part_of_it() -> None:
    ours, theirs, noise = values(2, 6, 2, 2, seed=1), values(2, 6, 2, 2, seed=2), torch.zeros(1, 3, 2, 2)
    found = BothHalves()(Seen(noise, None, {KEY: ours}), Seen(noise, None, {KEY: theirs}))
    assert float(found) == pytest.approx(float(((ours - theirs)[:, :3] ** 2).sum()), 1e-12)


def test_it_sees_what_the_denoiser_gave_before_guidance(student: Program, task: Task) -> None:
    tapped = Tapped(student.module(), taps_of((GuidedNoise(), BothHalves()), student))
    sample, condition = values(2, 4, 4, 4, seed=3).float(), values(2, 1, 32, seed=4).float()
    found = guided(tapped, sample, 50.0, (torch.zeros(2, 1, 32), condition), 1.5)
    without, with_condition = tapped.values[KEY].chunk(2)
    assert torch.equal(found, without + 1.5 * (with_condition - without))
    assert not torch.equal(without, with_condition)


def test_beside_the_guided_loss_it_trains_to_another_result(student: Program, teacher: Program, task: Task) -> None:
    seen: dict[str, list[float]] = {}
    results = {}
    for name, losses in {"guided": (GuidedNoise(),), "both": (GuidedNoise(), BothHalves())}.items():
        kept = seen.setdefault(name, [])
        settings = Settings(epochs=1, batch_size=2, more={"losses": losses})
        results[name] = distil(student, teacher, task, settings, on_step=lambda u, kept=kept: kept.append(u.loss))
    assert seen["both"][0] > seen["guided"][0] > 0
    tensor = "middle.lora_b"
    assert not torch.equal(results["both"].state[tensor], results["guided"].state[tensor])
    assert not torch.equal(results["both"].state[tensor], student.state[tensor])


@pytest.mark.parametrize("order", ["sampler", "shuffled", "mixed"])
def test_it_sees_student_and_teacher_at_the_same_step_in_any_order(
    student: Program, teacher: Program, task: Task, order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trajectory that is walked ahead leaves the teacher's values at its last step."""
    own, apart = BothHalves.__call__, []

    def watched(self: BothHalves, ours: Seen, theirs: Seen) -> Tensor:
        without, with_condition = theirs.taps[KEY].chunk(2)
        apart.append(float((without + 1.5 * (with_condition - without) - theirs.noise).abs().max()))
        return own(self, ours, theirs)

    monkeypatch.setattr(BothHalves, "__call__", watched)
    distil(student, teacher, task, Settings(epochs=2, batch_size=2, more={"losses": (BothHalves(),), "order": order}))
    assert len(apart) == 8
    assert max(apart) < 1e-5  # float rounding of other batches; another step's values are apart by 1
