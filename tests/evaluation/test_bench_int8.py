"""`hqc bench --runtime torch-int8`: what its worker loads and runs, and what is refused before anything is made."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hqc.cli import main
from hqc.evaluation.bench.models import Quantisation, find_models
from hqc.evaluation.bench.peers import USUAL_PEERS, compared
from hqc.evaluation.bench.worker import Worker
from hqc.evaluation.workspace import Workspace
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Stage
from hqc.runtimes.torch_runtime import TorchSession
from hqc.storage import load_program, save_program


@pytest.fixture
def student(captured: Any, tmp_path: Path) -> Path:
    program = captured("two_sites")
    save_program(program, tmp_path / "float.hqc")
    passes = [SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq((0.0, 500.0))]
    save_program(run_pipeline(program, passes), tmp_path / "student.hqc")
    return tmp_path / "student.hqc"


def test_a_worker_runs_the_integer_program(student: Path, tmp_path: Path) -> None:
    captured = str(tmp_path / "float.hqc")
    found = find_models(str(student), captured, Quantisation(), Workspace(tmp_path / "w"), "torch-int8")
    program = load_program(found.export)
    assert program.stage == Stage.INTEGER
    inputs = program.example_inputs(2, seed=1)
    arrays = {spec.name: tensor.numpy() for spec, tensor in zip(program.inputs, inputs, strict=True)}
    np.savez(tmp_path / "inputs.npz", **arrays)
    built, worker = compared(found.export, "torch-int8"), Worker()
    request = {"model": str(built.model), "inputs": str(tmp_path / "inputs.npz"), "threads": torch.get_num_threads()}
    loaded = worker.answer({"do": "load", "runtime": built.runtime, **request})
    assert loaded["load_seconds"] > 0
    assert worker.answer({"do": "run"})["milliseconds"] > 0
    worker.answer({"do": "output", "file": str(tmp_path / "y.npy")})
    wanted = TorchSession(program)(*inputs)
    output = torch.from_numpy(np.load(tmp_path / "y.npy"))
    assert float((output - wanted).norm() / wanted.norm()) <= 1e-5
    assert USUAL_PEERS["torch-int8"] == "onnxruntime-fp32"


def test_without_oneDNN_nothing_is_made(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    said = CliRunner().invoke(main, ["bench", str(student), "--runtime", "torch-int8", "--work-dir", "w"])
    assert said.exit_code == 2
    assert "runtime torch-int8: this torch was built without oneDNN" in said.stderr
    assert "integer.hqc:" not in said.stderr  # no stage was begun
