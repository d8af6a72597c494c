"""`scripts/gpu_contest.py` with torch on the CPU in the place of its runtimes."""

import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from contenders_here import run_here
from test_gpu_check import Put

from hqc.errors import EvaluationError
from hqc.evaluation.bench.contender import Loaded, Memory
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.storage import save_program

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def contest() -> ModuleType:
    """The script as a module."""
    import gpu_contest

    return gpu_contest


@pytest.fixture
def pair(captured, tmp_path: Path) -> tuple[Path, Path]:
    """A quantised and a float Program on disk."""
    program = captured("two_sites")
    passes = [SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq((0.0, 500.0))]
    save_program(program, tmp_path / "float.hqc")
    save_program(run_pipeline(program, passes), tmp_path / "quantised.hqc")
    return tmp_path / "quantised.hqc", tmp_path / "float.hqc"


def test_all_are_prepared_then_timed_in_turns(contest: ModuleType, monkeypatch, pair, tmp_path: Path) -> None:
    """A contender whose runtime is missing is named; every batch size of the others has its figures."""
    runtimes = {contest.HQC: "torch", contest.PACKED: "no-runtime", contest.COMPILED: "torch", contest.PLAIN: "torch"}
    monkeypatch.setattr(contest, "RUNTIMES", runtimes)
    monkeypatch.setattr(contest, "RUNS", 2)
    run_here(monkeypatch, "gpu_contest")
    warm = [sys.executable, "-c", "print('kernels are there')"]
    put = Put()
    failed = contest.run(contest.Contest(*pair, (2, 1), warm, dict(os.environ)), put, tmp_path, 60.0)
    assert set(failed) == {"batch 2, hqc int4 weights", "batch 1, hqc int4 weights"}
    assert "no-runtime" in failed["batch 2, hqc int4 weights"]
    assert (tmp_path / "warm.log").read_text() == "kernels are there\n"
    names = ["hqc", "torch-fp16-compile", "torch-fp16-cudagraph"]
    assert sorted(put.said["ready_seconds"]) == sorted(f"batch {batch}, {name}" for batch in (1, 2) for name in names)
    assert list(put.said["batches"]) == ["2", "1"]
    for found in put.said["batches"].values():
        assert list(found["milliseconds"]) == names
        assert all(len(entry["runs"]) == 2 and entry["median"] > 0 for entry in found["milliseconds"].values())
        assert list(found["speedup"]) == names[1:]
        assert found["error_to_half"]["torch-fp16-compile"] == 0.0  # both are the float program here
        assert 1e-4 < found["error_to_half"]["hqc"] < 1.0
    with np.load(tmp_path / "inputs-2.npz") as inputs:
        assert {len(array) for array in inputs.values()} == {2}


class Late:
    """In the place of a contender: hqc's first calls last until it is ended."""

    killed: ClassVar[list[str]] = []

    def __init__(self, name: str, runtime: str, model: Path, *, environment: Any) -> None:
        self.name, self._ended = name, threading.Event()

    def __enter__(self) -> "Late":
        return self

    def __exit__(self, *_: object) -> None: ...

    def load(self, inputs: Path, threads: int) -> Loaded:
        return Loaded(0.25, 0, 0)

    def prepare(self) -> float:
        if self.name == "hqc":
            assert self._ended.wait(30)
            raise EvaluationError(self.name, "its process was killed by signal 9", "–")
        return 0.5

    def kill(self) -> None:
        self.killed.append(self.name)
        self._ended.set()

    def run(self) -> float:
        return {"torch-fp16-compile": 2.0, "torch-fp16-cudagraph": 3.0}[self.name]

    def save_output(self, file: Path) -> None:
        np.save(file, np.ones(3, np.float32))

    def memory(self) -> Memory:
        return Memory(0, 0, 7)


def test_who_is_not_ready_is_ended(contest: ModuleType, monkeypatch, pair, tmp_path: Path) -> None:
    """It is named with the limit, and its peers are timed."""
    monkeypatch.setattr(contest, "Contender", Late)
    monkeypatch.setattr(contest, "RUNTIMES", {name: name for name in ("hqc", "torch-fp16-compile", contest.PLAIN)})
    put, warm = Put(), [sys.executable, "-c", ""]
    failed = contest.run(contest.Contest(*pair, (1,), warm, dict(os.environ)), put, tmp_path, 2.0)
    assert failed == {"batch 1, hqc": "not ready after 2 s"}
    assert Late.killed == ["hqc"]
    assert put.said["ready_seconds"] == dict.fromkeys(
        ("batch 1, torch-fp16-compile", "batch 1, torch-fp16-cudagraph"), 0.8
    )
    found = put.said["batches"]["1"]
    assert {name: entry["median"] for name, entry in found["milliseconds"].items()} == {
        "torch-fp16-compile": 2.0,
        "torch-fp16-cudagraph": 3.0,
    }
    assert found["speedup"] == {}
    assert found["device_bytes"] == {"torch-fp16-compile": 7, "torch-fp16-cudagraph": 7}
