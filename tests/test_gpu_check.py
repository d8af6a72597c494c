"""`scripts/gpu_check.sh` as far as it goes without a GPU: its refusal, its steps, its file's contents."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check

    return gpu_check


@WITHOUT_GPU
@pytest.mark.parametrize(
    "command",
    [["bash", "scripts/gpu_check.sh", "--models", "nowhere"], [sys.executable, "scripts/kernel_bench.py"]],
    ids=["gpu_check", "kernel_bench"],
)
def test_without_a_gpu_one_line_and_status_2(command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


def test_a_step_that_fails_is_said_and_the_others_go_on(check: ModuleType) -> None:
    def incomplete() -> dict[str, Any]:
        raise check.Incomplete({"batches": {"1": 2.5}}, "batch 2: out of time")

    steps = {"first": lambda: 1 / 0, "second": lambda: {"found": 3}, "third": incomplete}
    results, passed = check.run_steps(steps)
    assert not passed
    assert results["first"]["failed_because"].startswith("ZeroDivisionError")
    assert results["second"]["found"] == 3
    assert "failed_because" not in results["second"]
    assert results["third"] | {"batches": {"1": 2.5}, "failed_because": "batch 2: out of time"} == results["third"]
    assert check.run_steps({"only": dict})[1]


def test_the_clock_runs_down(check: ModuleType) -> None:
    clock = check.Clock(0.3)
    assert clock.left() == 1.0  # never nothing: a step that starts says itself that it ran out
    assert check.Clock(100).left(7) == 7
    assert 90 < check.Clock(100).left() <= 100


def test_processes_that_compile_ahead_are_ended_in_time(check: ModuleType, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "WARM", "import time; time.sleep(60)")
    warmers = check.Warmers(tmp_path)
    warmers.start()
    start = time.monotonic()
    warmers.finish(0.5)
    assert time.monotonic() - start < 20
    assert len(warmers._running) == len(check.BATCHES)
    assert all(process.poll() is not None for process in warmers._running)
    nothing = check.Warmers(tmp_path / "missing")
    nothing.start()
    assert nothing._running == []


def test_without_diffusers_and_outlines_it_says_what_to_give(check: ModuleType, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "_installed", lambda package: False)
    with pytest.raises(RuntimeError, match=r"diffusers is missing; give --models FOLDER"):
        check.make_models(None, tmp_path)


def test_models_come_from_outlines(check: ModuleType, captured, tmp_path: Path) -> None:
    """Float and packed programs that `hqc bench` takes."""
    from hqc.evaluation.bench.outline import write_outline
    from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
    from hqc.pipeline import run_pipeline
    from hqc.program import Stage
    from hqc.storage import load_program

    program = captured("two_sites")
    write_outline(program, tmp_path / "m" / "float")
    student = run_pipeline(program, [SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq((0.0, 500.0))])
    write_outline(student, tmp_path / "m" / "quantised")
    check.make_models(tmp_path / "m", tmp_path)
    assert load_program(tmp_path / "float.hqc").stage == Stage.CAPTURED
    packed = load_program(tmp_path / "quantised.hqc")
    assert packed.stage == Stage.INTEGER
    assert "conv.weight_packed" in packed.state
