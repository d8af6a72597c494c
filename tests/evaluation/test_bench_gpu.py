"""`hqc bench --runtime torch-cuda` as far as it goes without a GPU, and several batch sizes in one command."""

import io
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import hqc
from rich.console import Console

from hqc.errors import RuntimeMissingError
from hqc.evaluation.bench import gpu_timing, run, worker
from hqc.evaluation.bench.contender import Loaded, Memory
from hqc.evaluation.bench.machine import describe_machine, machine_line
from hqc.evaluation.bench.models import Quantisation, find_models
from hqc.evaluation.bench.result import BenchResult, Figures
from hqc.evaluation.bench.table import bench_table
from hqc.evaluation.workspace import Workspace
from hqc.export import export_program
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Stage
from hqc.runtimes.integer.cuda.session import require_cuda
from hqc.storage import load_program, save_program

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def gpu_result(batch: int) -> BenchResult:
    def figures(milliseconds: float, device_bytes: int) -> Figures:
        times = (milliseconds, milliseconds)
        return Figures("m", "torch-cuda", times, 10**6, Loaded(1, 1, 1), 9 * 10**9, 9 * 10**9, 0.1, (), device_bytes)

    return BenchResult(
        model="digits",
        quantisation="w4a4 rtn",
        protocol={"batch_size": batch, "threads": 1, "runs": 2, "warm_up": 1, "calibration": "noise"},
        machine=describe_machine() | {"gpu": "Some Card", "cuda": "13.0"},
        stages=(),
        ours=figures(1.25, 5 * 10**8),
        peers={"torch-fp16-cudagraph": figures(2.5, 10**9)},
        failed={},
    )


# ---- several batch sizes -------------------------------------------------------------------------------------------


def test_batch_sizes_in_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def measure(model: str, peers: Any, space: Any, **options: Any) -> BenchResult:
        asked.append((options["timing"].batch_size, options["runtime"]))
        return gpu_result(options["timing"].batch_size)

    monkeypatch.setattr(run, "bench", measure)
    command = ("bench", "digits", "--runtime", "torch-cuda", "--against", "torch-fp16-cudagraph")
    said = json.loads(hqc(*command, "--batch-size", "1, 2,8,2", "--json").stdout)
    assert asked == [(1, "torch-cuda"), (2, "torch-cuda"), (8, "torch-cuda")]
    assert [entry["protocol"]["batch_size"] for entry in said["batches"]] == [1, 2, 8]
    assert [entry["speedup"] for entry in said["batches"]] == [{"torch-fp16-cudagraph": 2.0}] * 3
    assert json.loads(hqc(*command, "--json").stdout)["protocol"]["batch_size"] == 2  # one size: one result, as before
    assert hqc(*command, "--batch-size", "1,8").stdout.count("torch-fp16-cudagraph") == 2


def test_on_a_gpu_both_half_precision_peers_are_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def measure(model: str, peers: Any, space: Any, **options: Any) -> BenchResult:
        asked.append(peers)
        return gpu_result(2)

    monkeypatch.setattr(run, "bench", measure)
    for arguments in (("--runtime", "torch-cuda"), (), ("--runtime", "torch-cuda", "--against", "torch")):
        assert hqc("bench", "digits", *arguments, "--json").exit_code == 0
    assert asked == [("torch-fp16-compile", "torch-fp16-cudagraph"), ("onnxruntime-fp32",), ("torch",)]


def test_peers_stand_from_the_fastest_on_and_loading_is_a_stage(
    monkeypatch: pytest.MonkeyPatch, stored: SimpleNamespace
) -> None:
    """Workers that stand in for a GPU: which runtime, how fast, what it takes of the card."""
    speeds = {"torch-cuda": 1.0, "torch-fp16-compile": 2.0, "torch-fp16-cudagraph": 3.0, "torch": 9.0}

    class Worker:
        def __init__(self, name: str, runtime: str, model: Path) -> None:
            self.name, self.speed = name, speeds[runtime]

        def __enter__(self) -> "Worker":
            return self

        def __exit__(self, *_: object) -> None: ...

        def load(self, inputs: Path, threads: int) -> Loaded:
            return Loaded(1.0, 1, 1)

        def prepare(self) -> float:
            return 2.0

        def save_output(self, file: Path) -> None:
            np.save(file, np.ones((2, 3), np.float32))

        def run(self) -> float:
            return self.speed

        def memory(self) -> Memory:
            return Memory(1, 1, 1)

    monkeypatch.setattr(run, "Contender", Worker)
    monkeypatch.setattr(run, "_require_machine", lambda runtime: None)
    monkeypatch.setattr(run, "describe_gpu", lambda: {"gpu": "Some Card", "cuda": "13.0"})
    space = Workspace(stored.root / "work")
    against = ("torch-fp16-cudagraph", "torch-fp16-compile")
    timing = run.Timing(runs=2, warm_up=0)
    result = run.bench(
        str(stored.student), against, space, float_model=str(stored.captured), timing=timing, runtime="torch-cuda"
    )
    assert list(result.peers) == ["torch-fp16-compile", "torch-fp16-cudagraph"]
    assert list(result.to_dict()["speedup"].items()) == [("torch-fp16-compile", 2.0), ("torch-fp16-cudagraph", 3.0)]
    first = [f"first calls of {name}" for name in ("hqc", *against)]
    assert [stage.name for stage in space.done] == ["integer.hqc", "loading, float reference", *first, "timing"]
    assert result.ours.loaded.load_seconds == 3.0


@pytest.mark.parametrize("sizes", ["0", "", "1,,2", "1,2.5", "-1", "1025", "many"])
def test_what_is_no_list_of_sizes(sizes: str) -> None:
    said = hqc("bench", "digits", f"--batch-size={sizes}")
    assert said.exit_code == 2
    assert "comma-separated" in said.stderr


def test_a_chart_shows_one_batch_size(tmp_path: Path) -> None:
    said = hqc("bench", "digits", "--batch-size", "1,2", "--chart", tmp_path / "c.png")
    assert said.exit_code == 2
    assert "--chart: shows one batch size, and --batch-size names 2" in said.stderr


# ---- figures of a GPU ----------------------------------------------------------------------------------------------


def test_the_table_shows_the_gpus_memory_and_its_milliseconds() -> None:
    console = Console(width=250, file=io.StringIO())
    console.print(bench_table(gpu_result(2)), soft_wrap=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    ours = next(line for line in text.splitlines() if "hqc w4a4" in line)
    assert [cell.strip() for cell in ours.strip(" |").split("|")][2:5] == ["1.250 (1.250–1.250)", "1.0", "500"]
    assert "Memory is the most that torch allocated on the GPU, weights included." in text
    assert "Machine: Some Card, CUDA 13.0; " in text
    assert "Some Card" not in machine_line(describe_machine())
    assert gpu_result(2).to_dict()["device_bytes"] == {"hqc": 5 * 10**8, "torch-fp16-cudagraph": 10**9}


def test_a_timed_run_on_a_gpu_is_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fill a fifth of a second, between two synchronisations, on a card that was busy just before."""
    waits: list[int] = []
    calls: list[float] = []
    spun: list[int] = []
    monkeypatch.setattr(gpu_timing, "spin_up", lambda: spun.append(len(calls)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(calls)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    monkeypatch.setattr(worker, "GPU_RUN_SECONDS", 0.05)

    def call() -> torch.Tensor:
        calls.append(time.perf_counter())
        time.sleep(0.005)
        return torch.ones(2, dtype=torch.float16)

    loaded = worker._on_gpu(call)
    assert calls == []  # loading is one thing, the first calls another
    loaded.prepare()
    before = len(calls)
    milliseconds = loaded.milliseconds()
    timed = len(calls) - before - 1
    assert spun == [before]
    assert 3 <= timed <= 10  # 0.05 s / 5 ms, fewer where the machine is busy
    assert waits[-2:] == [before + 1, len(calls)]
    assert 5 <= milliseconds <= 1000
    assert loaded.device_bytes() == 123
    assert loaded.output().dtype == np.float32


# ---- what is timed -------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(captured: Any, tmp_path: Path) -> SimpleNamespace:
    """A float program and its fake-quantised form on disk."""
    program = captured("two_sites")
    passes = [SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq((0.0, 500.0))]
    student = run_pipeline(program, passes)
    save_program(program, tmp_path / "float.hqc")
    save_program(student, tmp_path / "student.hqc")
    return SimpleNamespace(root=tmp_path, captured=tmp_path / "float.hqc", student=tmp_path / "student.hqc")


def test_a_gpu_runs_a_packed_program_not_an_export(stored: SimpleNamespace) -> None:
    space = Workspace(stored.root / "work")
    found = find_models(str(stored.student), str(stored.captured), Quantisation(), space, "torch-cuda")
    program = load_program(found.export)
    assert program.stage == Stage.INTEGER
    assert sorted(n for n in program.state if n.endswith("weight_packed")) == [
        "conv.weight_packed",
        "head.weight_packed",
    ]
    assert found.float_program == stored.captured
    assert [stage.name for stage in space.done] == ["integer.hqc"]


def test_an_export_is_no_program(captured: Any, stored: SimpleNamespace) -> None:
    export_program(captured("two_sites"), "onnxruntime", stored.root / "x")
    with pytest.raises(RuntimeMissingError, match=r"an ONNX export.*Give the program"):
        find_models(str(stored.root / "x"), None, Quantisation(), Workspace(stored.root / "work"), "torch-cuda")


# ---- refusals ------------------------------------------------------------------------------------------------------


@WITHOUT_GPU
def test_without_a_gpu_nothing_is_made(stored: SimpleNamespace) -> None:
    said = hqc("bench", stored.student, "--float", stored.captured, "--runtime", "torch-cuda", "--work-dir", "w")
    assert said.exit_code == 2
    assert "runtime torch-cuda" in said.stderr
    assert "CUDA" in said.stderr
    assert "integer.hqc:" not in said.stderr  # no stage was begun


@WITHOUT_GPU
@pytest.mark.parametrize("runtime", ["torch-cuda", "torch-fp16-cudagraph", "torch-fp16-compile"])
def test_a_worker_without_a_gpu_answers_with_the_reason(stored: SimpleNamespace, runtime: str) -> None:
    np.savez(stored.root / "in.npz", sample=np.zeros((1, 32, 4, 4), np.float32), timestep=np.zeros(1, np.float32))
    request = {"do": "load", "runtime": runtime, "model": str(stored.student), "threads": 1}
    answers = io.StringIO()
    worker.serve(io.StringIO(json.dumps(request | {"inputs": str(stored.root / "in.npz")}) + "\n"), answers)
    assert json.loads(answers.getvalue())["error"].startswith("RuntimeMissingError: runtime torch-cuda: ")


@WITHOUT_GPU
def test_the_reason_is_torch_or_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeMissingError, match="this torch was built without CUDA"):
        require_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RuntimeMissingError, match="torch finds no CUDA device"):
        require_cuda()


# ---- what a GPU machine may lack -----------------------------------------------------------------------------------

BLOCKED = """
import sys

for absent in sys.argv[1].split(","):
    sys.modules[absent] = None  # importing it fails, and looking for it finds nothing
import hqc.cli
import hqc.commands.bench
import hqc.evaluation.bench.run, hqc.evaluation.bench.table, hqc.evaluation.bench.worker
import hqc.runtimes.model, hqc.runtimes.integer.cuda.session, hqc.runtimes.integer.reference
from hqc.cli import main
from pytest import MonkeyPatch
from contenders_here import run_here
run_here(MonkeyPatch())  # contenders lack it too
main(sys.argv[2:], standalone_mode=False)
"""


def test_bench_of_programs_needs_no_model_library(stored: SimpleNamespace) -> None:
    """A program against a program, timed for real on the CPU, with all that a bare GPU machine may lack taken away."""
    import subprocess

    absent = "diffusers,transformers,accelerate,pydantic,torchmetrics,tensorrt,tensorrt_rtx"
    absent += ",onnx_graphsurgeon,fastapi,uvicorn,triton"
    command = ("bench", stored.student, "--float", stored.captured, "--against", "torch", "--runs", 1, "--warm-up", 0)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, absent, *map(str, command), "--threads", "1", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert list(json.loads(done.stdout)["speedup"]) == ["torch"]
