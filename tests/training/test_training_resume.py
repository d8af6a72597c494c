"""Checkpoints: round trip, damage, and a run that was interrupted and continued to the same bits."""

import json
from pathlib import Path
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
from guided_denoiser import Settings, distil, task_with, trained_tensors

from hqc.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hqc.errors import ArtefactError
from hqc.program import Program
from hqc.sampling import Task, Update
from hqc.storage import save_program

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture
def checkpoint() -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    names = ("value/middle.lora_a", "mean/middle.lora_a", "square/middle.lora_a", "value/@2.scale")
    return Checkpoint(7, {name: torch.randn(3, 2, generator=generator) for name in names})


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_round_trip(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path / "checkpoint")
    found = load_checkpoint(tmp_path / "checkpoint")
    assert found.step == 7
    assert found.tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in checkpoint.tensors.items())


def test_the_last_one_replaces_the_one_before(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, folder)
    save_checkpoint(Checkpoint(9, checkpoint.tensors), folder)
    assert load_checkpoint(folder).step == 9
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_of_the_user_is_not_replaced(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="exists and was not written by hqc"):
        save_checkpoint(checkpoint, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "notes.txt").read_text() == "mine"


def _flip(folder: Path) -> None:
    path = folder / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    path = folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _edit(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip, "is damaged"),
        (_truncate, "is truncated or changed"),
        (lambda folder: (folder / "checkpoint.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (lambda folder: _edit(folder, version=99), "format version 99"),
        (lambda folder: _edit(folder, format="hqc-program"), "holds 'hqc-program'; expected 'hqc-checkpoint'"),
        (lambda folder: _edit(folder, step="seven"), "cannot be read"),
        (lambda folder: _edit(folder, step=-1), "cannot be read"),
        (lambda folder: _edit(folder, files={}), "lists no checkpoint.safetensors"),
    ],
    ids=["bit flip", "truncated", "no tensors", "no manifest", "half a manifest", "version", "kind", "step", "negative",
         "unlisted"],
)  # fmt: skip
def test_damage_is_refused(checkpoint: Checkpoint, tmp_path: Path, damage: Any, said: str) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, folder)
    damage(folder)
    with pytest.raises(ArtefactError) as caught:
        load_checkpoint(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nan_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(Checkpoint(1, {"value/x": torch.tensor([float("nan")])}), tmp_path / "checkpoint")
    with pytest.raises(ArtefactError, match="holds NaN or infinity"):
        load_checkpoint(tmp_path / "checkpoint")


def test_a_program_is_not_a_checkpoint(teacher: Program, tmp_path: Path) -> None:
    save_program(teacher, tmp_path / "checkpoint")
    with pytest.raises(ArtefactError, match="holds 'hqc-program'; expected 'hqc-checkpoint'"):
        load_checkpoint(tmp_path / "checkpoint")


# ---- resuming ------------------------------------------------------------------------------------------------------


class _Interrupted(Exception):
    pass


def _interrupt(student: Program, teacher: Program, task: Task, settings: Settings, after: int) -> Checkpoint | None:
    """Runs until `after` updates are done, then raises out of the loop; the last checkpoint is what is left."""
    saved: list[Checkpoint] = []

    def stop(record: Update) -> None:
        if record.step == after:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        distil(student, teacher, task, settings, on_step=stop, on_checkpoint=saved.append)
    return saved[-1] if saved else None


def _assert_same_bits(ours: Program, theirs: Program, student: Program) -> None:
    assert ours.state.keys() == theirs.state.keys()
    for name, tensor in ours.state.items():
        assert torch.equal(tensor, theirs.state[name]), name
    assert any(not torch.equal(ours.state[name], student.state[name]) for name in trained_tensors(student))


@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize(
    ("after", "left"), [(4, 3), (5, 3), (6, 3), (7, 6), (9, 6), (10, 9)], ids=lambda value: str(value)
)
def test_an_interrupted_run_continues_to_the_same_bits(
    student: Program,
    teacher: Program,
    task: Task,
    settings: Settings,
    tmp_path: Path,
    after: int,
    left: int,
    eta: float,
) -> None:
    """Three trajectories of four steps, a checkpoint every three: in the middle of each of them, and through a file."""
    settings = settings.having({"eta": eta})
    whole: list[Update] = []
    wanted = distil(student, teacher, task, settings, on_step=whole.append)
    checkpoint = _interrupt(student, teacher, task, settings, after)
    assert checkpoint is not None
    assert checkpoint.step == left
    save_checkpoint(checkpoint, tmp_path / "checkpoint")
    rest: list[Update] = []
    found = distil(
        student, teacher, task, settings, resume=load_checkpoint(tmp_path / "checkpoint"), on_step=rest.append
    )
    _assert_same_bits(found, wanted, student)
    assert [s.step for s in rest] == list(range(left + 1, 13))
    assert [(s.loss, s.timestep, s.epoch) for s in rest] == [(s.loss, s.timestep, s.epoch) for s in whole[left:]]


@pytest.mark.parametrize(
    "kind",
    [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler],
)
def test_samplers_with_a_memory_continue_to_the_same_bits(
    student: Program, teacher: Program, settings: Settings, kind: Any
) -> None:
    task = task_with(kind)
    settings = settings.having({"steps": 14, "checkpoint_every": 7})
    wanted = distil(student, teacher, task, settings)
    checkpoint = _interrupt(student, teacher, task, settings, 10)
    assert checkpoint is not None
    assert checkpoint.step == 7
    _assert_same_bits(distil(student, teacher, task, settings, resume=checkpoint), wanted, student)


def test_the_moments_matter(student: Program, teacher: Program, task: Task, settings: Settings) -> None:
    """The comparison above can fail: without AdamW's moments the continued run goes elsewhere."""
    wanted = distil(student, teacher, task, settings)
    checkpoint = _interrupt(student, teacher, task, settings, 5)
    assert checkpoint is not None
    forgetful = {n: torch.zeros_like(t) if n.startswith("mean/") else t for n, t in checkpoint.tensors.items()}
    found = distil(student, teacher, task, settings, resume=Checkpoint(checkpoint.step, forgetful))
    assert not torch.equal(found.state["middle.lora_b"], wanted.state["middle.lora_b"])


def test_no_checkpoint_is_written_at_the_end(
    student: Program, teacher: Program, task: Task, settings: Settings
) -> None:
    saved: list[Checkpoint] = []
    distil(student, teacher, task, settings, on_checkpoint=saved.append)
    assert [checkpoint.step for checkpoint in saved] == [3, 6, 9]


def test_a_checkpoint_of_another_program_is_refused(
    student: Program, teacher: Program, task: Task, settings: Settings, checkpoint: Checkpoint
) -> None:
    with pytest.raises(ArtefactError, match=r"checkpoint: has no value/token\."):
        distil(student, teacher, task, settings, resume=checkpoint)
