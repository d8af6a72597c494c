"""`scripts/gpu_check.sh` as far as it goes without a GPU: its refusal, its steps, its file's contents."""

import argparse
import json
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
def check() -> ModuleType:
    """The script as a module."""
    import gpu_check

    return gpu_check


@WITHOUT_GPU
def test_without_a_gpu_one_line_and_status_2() -> None:
    command, environment = (
        ["bash", "scripts/gpu_check.sh", "--models", "nowhere"],
        os.environ | {"PYTHON": sys.executable},
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


@WITHOUT_GPU
def test_without_a_gpu_kernels_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kernel_bench

    monkeypatch.setattr(sys, "argv", ["kernel_bench.py"])
    with pytest.raises(SystemExit) as ended:
        kernel_bench.main()
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "kernel_bench: torch finds no CUDA device\n")


# ---- the file ------------------------------------------------------------------------------------------------------


def test_every_figure_is_in_the_file_at_once_and_a_failure_loses_none(check: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "new" / "card.json"
    seen: list[dict[str, Any]] = []

    def read() -> dict[str, Any]:
        return json.loads(file.read_text())

    def unet(put: Any) -> None:
        put(model="m", batches={"8": 2.5})
        seen.append(read())
        put(batches={"2": 1.5})
        raise RuntimeError("batch 32:\nout of time")

    def kernels(put: Any) -> None:
        seen.append(read())
        put(found=3)

    report = check.Report(file, ("unet", "kernels"))
    report.about(date="today")
    assert not check.run_steps({"unet": unet, "kernels": kernels}, report, commit="abc")
    assert seen[0]["unet"] == {"commit": "abc", "model": "m", "batches": {"8": 2.5}}
    assert seen[1]["unet"]["batches"] == {"8": 2.5, "2": 1.5}
    assert seen[1]["unet"]["failed_because"] == "RuntimeError: batch 32: out of time"
    report.about(passed=False)
    found = read()
    assert found["kernels"] == found["kernels"] | {"found": 3, "commit": "abc"}
    assert "failed_because" not in found["kernels"]
    assert list(found) == ["passed", "date", "unet", "kernels"]
    assert check.run_steps({"only": lambda put: None}, report)
    assert [path.name for path in file.parent.iterdir()] == ["card.json"]


def test_some_steps_again_keep_the_others(check: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text(json.dumps({"passed": True, "unet": {"batches": 1}, "tests": {"tests": 2}}))
    report = check.Report(file, ("tests",))
    report.put("tests", tests=3)
    assert json.loads(file.read_text()) == {"unet": {"batches": 1}, "tests": {"tests": 3}}
    file.write_text("{")  # damaged: nothing is kept
    check.Report(file, ("tests",)).put("tests", tests=4)
    assert json.loads(file.read_text()) == {"tests": {"tests": 4}}


def test_steps_by_name(check: ModuleType) -> None:
    assert check._steps("tests, models,unet") == ("models", "unet", "tests")
    with pytest.raises(argparse.ArgumentTypeError, match="there is no step 'units'; there are models, unet"):
        check._steps("models,units")


def test_a_description_that_fails_is_null(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from hqc.evaluation.bench import machine

    def broken() -> Any:
        raise AttributeError("no such function")

    monkeypatch.setattr(machine, "describe_gpu", broken)
    monkeypatch.setattr(subprocess, "run", broken)
    found = check.describe()
    assert found["commit"] is None
    assert found["machine"]["cores"] >= 1


# ---- steps ---------------------------------------------------------------------------------------------------------


class Put:
    """Collects what a step says."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    def __call__(self, **values: Any) -> None:
        for name, value in values.items():
            old = self.said.get(name)
            self.said[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder that seems to hold the models."""
    for name in ("float.hqc", "quantised.hqc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    return tmp_path


def test_the_contest_is_reported(check: ModuleType, monkeypatch, work: Path, capsys) -> None:
    """Two batch sizes are there, one contender is missing."""
    one = {"milliseconds": {"hqc": {"median": 2.0}, "p": {"median": 3.0}}, "speedup": {"p": 1.5}}

    def run(contest: Any, put: Any, folder: Path, seconds: float) -> dict[str, str]:
        assert contest.environment["TORCHINDUCTOR_CACHE_DIR"] == str(work / "inductor")
        assert contest.warm[2:] == [str(work / "quantised.hqc"), "--kernel-bench", "--batch-size", "8,2,32,1"]
        assert (contest.quantised, contest.float, seconds) == (work / "quantised.hqc", work / "float.hqc", 150)
        put(ready_seconds={"batch 8, hqc": 3.0})
        for batch in ("8", "2"):
            put(batches={batch: one})
        return {"batch 32, hqc": "not ready after 150 s"}

    monkeypatch.setattr(check.gpu_contest, "run", run)
    put = Put()
    with pytest.raises(RuntimeError, match="batch 32, hqc: not ready after 150 s"):
        check.run_unet(put, check.Clock(1000), work)
    assert put.said["batches"] == {"8": one, "2": one}
    assert put.said["failed"] == {"batch 32, hqc": "not ready after 150 s"}
    assert "batch 2: hqc 2.000 ms, p 3.000 ms; 1.50× p" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["run_unet", "run_profiles"])
def test_without_models_a_step_says_so(check: ModuleType, step: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="there is no model, see models"):
        getattr(check, step)(Put(), check.Clock(10), tmp_path)


@pytest.mark.parametrize(("end", "why"), [("sys.exit(3)", "some trouble"), ("time.sleep(60)", "out of time")])
def test_what_was_profiled_before_the_end_counts(
    check: ModuleType, monkeypatch, work: Path, end: str, why: str
) -> None:
    code = """
import json, sys, time
one = {"kernels": 9, "busy_ms": 1.0, "by_kind": {"copies": {"ms": 1.0}}}
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps({"batches": {"8": one}}))
print("some trouble", flush=True)
END
"""
    (work / "scripts").mkdir()
    (work / "scripts" / "gpu_profile.py").write_text(code.replace("END", end))
    monkeypatch.setattr(check, "ROOT", work)
    monkeypatch.setattr(check, "PROFILE_SECONDS", 3)
    put = Put()
    with pytest.raises(RuntimeError, match=f"torch-cuda: {why}"):
        check.run_profiles(put, check.Clock(1000), work)
    assert put.said["torch-cuda"]["8"]["kernels"] == 9


def test_kernel_rows_stay_when_time_runs_out(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(us: float) -> dict[str, Any]:
        found = {"us": us, "us_low": us, "us_high": us, "rate": 1.0}
        shape = [8, 192, 64, 64]
        return {
            "shape": shape,
            "note": "",
            "unit": "GB/s",
            "contenders": {"hqc NHWC": found, "copy": {**found, "us": 8.0}},
        }

    def measure(on_row: Any) -> None:
        on_row("hadamard_quantize", row(10.0))
        time.sleep(0.1)
        on_row("hadamard_quantize", row(16.0))
        raise AssertionError("time is over")

    monkeypatch.setattr(check.kernel_bench, "measure", measure)
    put = Put()
    with pytest.raises(TimeoutError, match="out of time"):
        check.run_kernels(put, check.Clock(1.05))
    assert [row["contenders"]["hqc NHWC"]["us"] for row in put.said["rows"]["hadamard_quantize"]] == [10.0, 16.0]
    assert put.said["least_of_copy"] == 0.5


def test_a_tuning_is_summed_up(check: ModuleType, monkeypatch, work: Path) -> None:
    """The command is a stand-in that prints what `hqc tune --json` prints, after progress."""
    said = {"file": "x", "measured": 3, "kept": 1, "left": 0, "us_before": 9.0, "us_after": 6.0, "problems": ["p"]}
    code = f"""
import json, sys
open("asked.json", "w").write(json.dumps(sys.argv[2:]))
print("products 3 of 3")
print(json.dumps({said}, indent=1))
"""
    (work / "tune.py").write_text(code)
    monkeypatch.setattr(check, "ROOT", work)
    started = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        assert command[3] == "tune"
        return started([sys.executable, "tune.py", *command[3:]], **options)

    monkeypatch.setattr(check.subprocess, "Popen", popen)
    put = Put()
    check.run_tune(put, check.Clock(100), work, work / "card-tiles.json")
    assert put.said == {name: said[name] for name in said if name != "file"} | {"file": "card-tiles.json"}
    asked = json.loads((work / "asked.json").read_text())
    assert asked[:3] == [str(work / "quantised.hqc"), "--batch-size", "1,2,8,32"]
    assert asked[asked.index("--limit-seconds") + 1] == "70"


def test_tests_that_run_out_of_time_still_count(check: ModuleType, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        "import pathlib, time, pytest\npytestmark = pytest.mark.gpu\ndef test_a(): ...\n"
        "def test_b(): assert False\ndef test_c(): pathlib.Path('late').touch(); time.sleep(60)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "_installed", lambda package: False)
    put, clock = Put(), check.Clock(100)

    def left() -> float:
        """Until the last test has begun, then nothing: however long the others took."""
        wait_for(tmp_path / "late")
        return 0.0

    monkeypatch.setattr(clock, "left", left)
    with pytest.raises(TimeoutError, match=r"out of time; FAILED tests/test_x.py::test_b"):
        check.run_tests(put, clock, tmp_path)
    assert put.said["failures"] == 1
    assert put.said["failing"][0].startswith("FAILED tests/test_x.py::test_b")


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_clock_runs_down(check: ModuleType) -> None:
    clock = check.Clock(0.3)
    assert clock.left() == 1.0  # never nothing: a step that starts says itself that it ran out
    assert check.Clock(100).left(7) == 7
    assert 90 < check.Clock(100).left() <= 100


def test_without_diffusers_and_outlines_it_says_what_to_give(check: ModuleType, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "_installed", lambda package: False)
    with pytest.raises(RuntimeError, match=r"diffusers is missing; give --models FOLDER"):
        check.make_models(Put(), None, tmp_path)


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
    put = Put()
    check.make_models(put, tmp_path / "m", tmp_path)
    assert "kept" not in put.said
    check.make_models(put, None, tmp_path)
    assert put.said["kept"]
    assert load_program(tmp_path / "float.hqc").stage == Stage.CAPTURED
    packed = load_program(tmp_path / "quantised.hqc")
    assert packed.stage == Stage.INTEGER
    assert "conv.weight_packed" in packed.state
