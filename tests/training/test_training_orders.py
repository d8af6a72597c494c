"""Orders, own trajectories, averages, warm-up, step weights, validation: each against what it should be by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from guided_denoiser import Settings, distil, task_with
from torch import Tensor

from hqc.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hqc.pipeline import run_procedure
from hqc.program import Program
from hqc.recipes.work_folder import Run
from hqc.sampling import Sampler, Task, Update, Validation, Work, guided
from hqc.sampling.task import denoiser
from hqc.training import Distil, Group
from hqc.training.losses import GuidedNoise, Seen
from hqc.training.step_weights import step_weights
from hqc.training.trajectories import Epochs, walk

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SAMPLER = Sampler(4, 1.5, 0.0)
OPTIONS = {
    "shuffled": {"order": "shuffled"},
    "mixed": {"order": "mixed", "weighting": "effect"},
    "own": {"own_share": 1.0},
    "averaged": {"ema": 0.9, "warm_up": 0.5},
    "all": {"order": "mixed", "own_share": 1.0, "ema": 0.5, "weighting": "effect"},
}


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("after", [5, 10])
def test_every_option_changes_the_result_and_resumes_to_the_same_bits(
    student: Program, teacher: Program, task: Task, tmp_path: Path, name: str, after: int
) -> None:
    settings = Settings().having({"more": OPTIONS[name]})
    plain, wanted = distil(student, teacher, task, Settings()), distil(student, teacher, task, settings)
    assert not torch.equal(wanted.state["middle.lora_b"], plain.state["middle.lora_b"])
    saved: list[Checkpoint] = []

    def stop(update: Update) -> None:
        if update.step == after:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        distil(student, teacher, task, settings, on_step=stop, on_checkpoint=saved.append)
    save_checkpoint(saved[-1], tmp_path / "checkpoint")
    found = distil(student, teacher, task, settings, resume=load_checkpoint(tmp_path / "checkpoint"))
    assert all(torch.equal(tensor, wanted.state[key]) for key, tensor in found.state.items())


def _states(task: Task, teacher: Program, student: Program, **options: Any) -> list[Any]:
    order, share = options.get("order", "sampler"), options.get("own_share", 0.0)
    epochs = Epochs(task, SAMPLER, 3, 5, order, share, total=8)
    return list(epochs.states(denoiser(teacher.module()), denoiser(student.module()), 0))


@pytest.mark.parametrize("order", ["shuffled", "mixed"])
def test_an_epoch_in_another_order_is_the_same_samples_once(
    task: Task, teacher: Program, student: Program, order: str
) -> None:
    plain, other = _states(task, teacher, student), _states(task, teacher, student, order=order)
    assert [state.step for state in other] == list(range(8))

    def rows(states: list[Any]) -> list[tuple[float, ...]]:
        found = []
        for state in states:
            times = state.times or (state.timestep,) * 3
            pairs = zip(times, state.sample, state.wanted, strict=True)
            found += [(t, *x.flatten().tolist(), *w.flatten().tolist()) for t, x, w in pairs]
        return sorted(found)

    assert rows(plain[:4]) == rows(other[:4])
    assert rows(plain[4:]) == rows(other[4:])
    mixed = [state for state in other if len(set(state.times)) > 1]
    assert bool(mixed) == (order == "mixed")


def test_mixed_batches_keep_each_samples_condition_and_noise(task: Task, teacher: Program, student: Program) -> None:
    denoise = denoiser(teacher.module())
    for state in _states(task, teacher, student, order="mixed"):
        found = guided(denoise, state.sample, state.time_input, state.conditions, 1.5)
        torch.testing.assert_close(found, state.wanted, rtol=1e-4, atol=1e-5)  # another batch rounds otherwise


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_own_trajectories_are_the_students_with_the_teachers_noise(
    teacher: Program, student: Program, kind: Any
) -> None:
    task = task_with(kind)
    states = _states(task, teacher, student, own_share=1.0)
    own = list(walk(task, SAMPLER, denoiser(student.module()), batch_size=3, seed=5, epoch=1))
    assert [torch.equal(a.sample, b.sample) for a, b in zip(states[4:], own, strict=True)] == [True] * 4
    assert not torch.equal(states[5].wanted, own[1].wanted)
    for state in states[4:]:
        wanted = guided(denoiser(teacher.module()), state.sample, state.time_input, state.conditions, 1.5)
        assert torch.equal(state.wanted, wanted)
    assert torch.equal(states[0].sample, _states(task, teacher, student)[0].sample)  # the first is the teacher's


def test_weights_are_measured_effects(task: Task, teacher: Program, student: Program) -> None:
    found = step_weights(task, SAMPLER, denoiser(teacher.module()), denoiser(student.module()), samples=4, seed=1)
    assert len(found) == 4
    assert sum(found) / 4 == pytest.approx(1, rel=0.05)  # the bounds move it
    assert len({round(one, 6) for one in found}) > 1
    same = step_weights(task, SAMPLER, denoiser(teacher.module()), denoiser(teacher.module()), samples=2, seed=1)
    assert same == (1.0,) * 4  # nothing moves: nothing is preferred


def test_the_loss_weighs_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 2, 2, 2, generator=generator), torch.randn(3, 2, 2, 2, generator=generator)
    weights = torch.tensor([0.5, 2.0, 3.0])
    squares = ((a - b) ** 2).sum((1, 2, 3))
    assert float(GuidedNoise()(Seen(a), Seen(b))) == pytest.approx(float(squares.sum()))
    assert float(GuidedNoise()(Seen(a, 2.0), Seen(b, 2.0))) == pytest.approx(2 * float(squares.sum()))
    weighed = GuidedNoise(weight=3.0)(Seen(a, weights), Seen(b, weights))
    assert float(weighed) == pytest.approx(3 * float((squares * weights).sum()))


def test_averages_are_those_of_the_values(student: Program, teacher: Program, task: Task) -> None:
    name, values = "middle.lora_b", list[Tensor]()
    settings = Settings().having({"checkpoint_every": 1, "steps": 4})
    averaged = settings.having({"more": {"ema": 0.75}})
    result = distil(student, teacher, task, averaged, on_checkpoint=lambda c: values.append(c.tensors[f"value/{name}"]))
    last = distil(student, teacher, task, settings).state[name]  # averaging does not change the values themselves
    average = student.state[name]
    for value in (*values, last):
        average = 0.75 * average + 0.25 * value
    torch.testing.assert_close(result.state[name], average, rtol=1e-5, atol=1e-8)


def test_groups_without_scales_learn_too(student: Program, teacher: Program, task: Task) -> None:
    step = Distil(groups=(Group("*.lora_?", rate=1e-2),), updates=2, batch_size=2)
    result = run_procedure(student, step, Work(teacher, task, SAMPLER))
    assert not torch.equal(result.state["middle.lora_b"], student.state["middle.lora_b"])
    assert torch.equal(result.state["middle.weight_scale"], student.state["middle.weight_scale"])


def test_validation_is_on_a_trajectory_of_its_own_and_changes_nothing(
    student: Program, teacher: Program, task: Task, tmp_path: Path
) -> None:
    found: list[Validation] = []
    watched = Settings().having({"more": {"validate_every": 5}})
    result = distil(student, teacher, task, watched, on_validation=found.append)
    plain = distil(student, teacher, task, Settings())
    assert all(torch.equal(tensor, plain.state[name]) for name, tensor in result.state.items())
    assert [one.step for one in found] == [5, 10]
    assert found[0].timesteps == (75.0, 50.0, 25.0, 0.0)
    assert all(0 < error < 1 for one in found for error in one.relative_error)
    assert all(0.5 < gain < 1.5 for one in found for gain in one.gain)
    run = Run(tmp_path / "run")
    run.begin({})
    run.log(found[0])
    line = json.loads((tmp_path / "run" / "validation.jsonl").read_text())
    assert (line["step"], len(line["gain"])) == (5, 4)
