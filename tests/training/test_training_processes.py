"""Several processes that train together: the result of one, in shares; the first alone writes and prints."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import process_of_two
import pytest
import torch
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.errors import TrainingError
from hqc.processes import ALONE, Processes, is_first, joined
from hqc.program import InputSpec, Program
from hqc.storage import load_program, save_program
from hqc.training.shares import shared, state_rows, whole_batch
from hqc.training.trajectories import State

LAUNCHED = ("RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def free_ports(count: int) -> list[str]:
    """Of this machine, found together so that they differ."""
    with ExitStack() as stack:
        found = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in found]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """By gloo, from the command line and from Python, there cut after three updates and resumed."""
    program = tmp_path / "captured.hqc"
    save_program(traced_pipeline("classes"), program, pipeline=saved_pipeline("classes"))
    arguments = [str(program), str(tmp_path / "two.hqc"), str(tmp_path / "work"), *free_ports(3)]
    started = []
    for rank in range(2):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, process_of_two.__file__, *arguments]
        environment = {**os.environ, **own, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=environment, text=True, **pipes))  # type: ignore[call-overload]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert said[1] == ("", "")
    assert said[0][0].startswith(f"trained {program}")
    refusal = "hqc: --batch-size 3: is not divided by 2 processes. Give a multiple of 2, for example 2.\n"
    assert said[0][1] == refusal

    captured = load_program(program)
    related = {"recipe": process_of_two.related(), "settings": process_of_two.RELATED}
    for name, more in (("work", {}), ("related", related)):
        require_same_training(process_of_two.trained(captured, **more), load_program(tmp_path / f"{name}.hqc"))
    log = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "two.hqc.odd").exists()
    assert load_program(tmp_path / "two.hqc").plan.training["processes"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("captured.hqc", "related", "related.hqc", "two.hqc", "two.hqc.training", "work", "work.hqc")
    ]


def require_same_training(alone: Program, together: Program) -> None:
    """What one process learns and what two do differs by the order of sums."""
    trained = [name for name in alone.state if name.endswith(("lora_a", "lora_b", "activation_scale_table"))]
    assert trained
    for name in trained:
        error = float((together.state[name] - alone.state[name]).norm() / alone.state[name].norm())
        assert error <= 1e-5, name


def test_shares_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser that is shared sees its own rows, and of what all samples share the whole."""
    inputs = (
        InputSpec("sample", ("N", 2)),
        InputSpec("timestep", ("N",)),
        InputSpec("condition", ("N", 3)),
        InputSpec("ids", (4, 2)),
    )
    sample, times, condition, ids = torch.randn(6, 2), torch.arange(6.0), torch.randn(6, 3), torch.randn(4, 2)
    seen = []

    def denoise(*given: torch.Tensor | None) -> torch.Tensor:
        seen.append(given)
        return given[0] * 2

    found = []
    monkeypatch.setattr(Processes, "gathered", lambda self, own: found.append(own) or own)
    for rank in range(3):
        shared(denoise, Processes(rank, 3), inputs)(sample, times, condition, ids)
        assert torch.equal(seen[-1][1], times[2 * rank : 2 * rank + 2])
        assert torch.equal(seen[-1][2], condition[2 * rank : 2 * rank + 2])
        assert torch.equal(seen[-1][3], ids)
    assert torch.equal(torch.cat(found), sample * 2)
    assert shared(denoise, ALONE, inputs) is denoise

    state = State(1, 0, 5.0, times, sample, ((condition, ids), (condition + 1, ids)), sample, tuple(times.tolist()))
    part = state_rows(state, Processes(1, 3), inputs)
    assert torch.equal(part.sample, sample[2:4])
    assert torch.equal(part.wanted, sample[2:4])
    assert part.times == (2.0, 3.0)
    assert torch.equal(part.time_input, times[2:4])
    assert torch.equal(part.conditions[1][0], condition[2:4] + 1)
    assert part.conditions[0][1] is ids
    one = state_rows(replace(state, time_input=5.0, conditions=(None, condition), times=()), Processes(2, 3), inputs)
    assert one.time_input == 5.0
    assert one.conditions[0] is None
    assert torch.equal(one.conditions[1], condition[4:])


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "this is process 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "this is process -1 of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "environment variable RANK: is 'one'; expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "2 processes: cannot be joined"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "1"}, "asked for several processes and has started one"),
    ],
)
def test_launchers_that_are_none(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError) as error, joined():
        pass
    assert said in error.value.line
    assert len(error.value.line) <= 300
    assert is_first()


def test_alone_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # of `accelerate launch --cpu` with one process
    with joined() as processes:
        assert processes == ALONE
    tensor = torch.randn(3)
    assert ALONE.summed(tensor) is tensor
    assert ALONE.gathered(tensor) is tensor
    assert ALONE.rows(5) == slice(0, 5)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert not is_first()


def test_a_batch_that_processes_do_not_divide_is_refused(captured) -> None:
    from hqc.sampling import Work, synthetic_task
    from hqc.training import Distil, Group

    program = captured("unconditional")
    step = Distil(groups=(Group("*", rate=1e-3),), batch_size=3)
    work = Work(program, synthetic_task(program), processes=Processes(0, 2))
    with pytest.raises(TrainingError, match="--batch-size 3: is not divided by 2 processes"):
        step.check(program, work)


def test_the_whole_batch_of_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of guidance as one process has them."""
    whole = torch.randn(2 * 6, 3)  # six samples, two halves
    halves = whole.chunk(2)
    shares = [torch.cat([half[2 * rank : 2 * rank + 2] for half in halves]) for rank in range(3)]
    monkeypatch.setattr(Processes, "gathered", lambda self, own: torch.cat(shares))
    for rank in range(3):
        assert torch.equal(whole_batch(shares[rank], Processes(rank, 3), 2), whole)
    assert whole_batch(whole, ALONE, 2) is whole
