"""Peers of other toolkits: torch.compile on a CPU, NNCF's quantisation in OpenVINO; what they need and do."""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hqc.cli import main
from hqc.errors import EvaluationError, RuntimeMissingError
from hqc.evaluation.bench import requirements, worker
from hqc.evaluation.bench.batches import read_batches
from hqc.evaluation.bench.models import Quantisation, find_models
from hqc.evaluation.bench.peers import PEERS, Built, size_bytes
from hqc.evaluation.bench.requirements import require_cpp_compiler, require_openvino
from hqc.evaluation.bench.run import Timing, bench
from hqc.evaluation.bench.toolkits import NNCF, ONNXRUNTIME, quantised_by
from hqc.evaluation.bench.torch_compile import CompiledSession
from hqc.evaluation.workspace import Workspace
from hqc.program import Program
from hqc.storage import load_program, save_program

MISSING = [name for name in ("openvino", "nncf") if importlib.util.find_spec(name) is None]
WITH_NNCF = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}; pip install 'hqc[openvino]'")

Captured = Callable[[str], Program]


# ---- what they need ------------------------------------------------------------------------------------------------


def test_without_a_cpp_compiler_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeMissingError, match=r"torch-compile: .*needs a C\+\+ compiler; g\+\+ is not there. Inst"):
        require_cpp_compiler()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(RuntimeMissingError, match=r"CXX names /nowhere/c\+\+, which is not there"):
        require_cpp_compiler()
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("CXX", "g++ -m64")
    with pytest.raises(RuntimeMissingError, match=r"CXX is `g\+\+ -m64`, which it takes for the name of one program"):
        require_cpp_compiler()
    monkeypatch.delenv("CXX")
    require_cpp_compiler()


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({}, "openvino is not installed"),
        ({"openvino": "2026.4.1"}, "nncf is not installed"),
        ({"openvino": "2024.6.0", "nncf": "3.4.0"}, "openvino 2024.6.0 is older than 2025.2"),
        ({"openvino": "2025.2.0", "nncf": "2.16.0"}, "nncf 2.16.0 is older than 2.17"),
        ({"openvino": "2025.2.0", "nncf": "2.17.0"}, None),
    ],
)
def test_openvino_and_nncf_by_version(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], says: str | None
) -> None:
    monkeypatch.setattr(requirements, "package_version", versions.get)
    monkeypatch.setattr(requirements, "find_spec", versions.get)
    if says is None:
        return require_openvino()
    with pytest.raises(RuntimeMissingError) as caught:
        require_openvino()
    assert says in caught.value.line
    assert "pip install 'hqc[openvino]'" in caught.value.line
    return None


def test_a_missing_package_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(requirements, "package_version", lambda name: None)
    arguments = ["bench", "digits", "--against", "torch,openvino-int8", "--work-dir", str(tmp_path / "w")]
    result = CliRunner(catch_exceptions=False).invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1] == (
        "hqc: peer openvino-int8: openvino is not installed. Run `pip install 'hqc[openvino]'`, or leave the peer out "
        "of --against."
    )
    assert not list((tmp_path / "w").glob("*"))


# ---- torch.compile -------------------------------------------------------------------------------------------------


def test_the_float_program_is_compiled_in_one_piece_and_computes_the_same(captured: Captured) -> None:
    """Dynamo's part, which needs no compiler; the first call of a set of sizes is the one that compiles."""
    program = captured("two_sites")
    session = CompiledSession(program, backend="eager")
    inputs = program.example_inputs(2, seed=1)
    session.compile(*inputs)
    torch.testing.assert_close(session(*inputs), program.module()(*inputs), rtol=0, atol=0)


def test_inductor_is_asked_to_freeze_the_weights(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def compile(module: torch.nn.Module, **options: object) -> torch.nn.Module:
        asked.append(options)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("hqc.evaluation.bench.torch_compile.require_cpp_compiler", lambda: None)
    CompiledSession(captured("two_sites"))
    assert asked == [{"dynamic": False, "fullgraph": True, "backend": "inductor", "options": {"freezing": True}}]


@pytest.mark.long
def test_inductor_compiles_and_computes_the_same(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real one, with frozen weights, for two sets of sizes."""
    try:
        require_cpp_compiler()
    except RuntimeMissingError as error:
        pytest.skip(error.line)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    program = captured("two_sites")
    session = CompiledSession(program)
    for batch in (1, 2):
        inputs = program.example_inputs(batch, seed=1)
        session.compile(*inputs)
        torch.testing.assert_close(session(*inputs), program.module()(*inputs), rtol=1e-4, atol=1e-4)
    assert list(tmp_path.rglob("*.so"))


def test_the_worker_compiles_before_anything_is_timed(
    captured: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiling is part of `prepare`, whose seconds the load's figure includes."""
    program, calls = captured("two_sites"), list[str]()

    class Session:
        def __init__(self, program: Program) -> None:
            self.inputs, self._module = program.inputs, program.module()

        def compile(self, *inputs: torch.Tensor) -> None:
            calls.append("compile")

        @torch.no_grad()
        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            calls.append("call")
            return self._module(*inputs)  # type: ignore[no-any-return]

    monkeypatch.setattr("hqc.evaluation.bench.torch_compile.CompiledSession", Session)
    save_program(program, tmp_path / "float.hqc")
    arrays = {s.name: t.numpy() for s, t in zip(program.inputs, program.example_inputs(2, seed=0), strict=True)}
    loaded = worker.RUNTIMES["torch-compile"](torch.get_num_threads())(tmp_path / "float.hqc", arrays)
    assert calls == []
    loaded.prepare()
    assert loaded.milliseconds() > 0
    assert calls == ["compile", "call"]
    np.testing.assert_array_equal(loaded.output(), program.module()(*map(torch.from_numpy, arrays.values())).numpy())


# ---- tools that quantise -------------------------------------------------------------------------------------------


def test_tools_are_given_the_same_calibration(
    captured: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every tool reads the inputs of the float sampler's calls, and what it writes is kept until versions change."""
    program, read = captured("cross_attention"), list[list[dict[str, np.ndarray]]]()
    save_program(program, tmp_path / "float.hqc")

    def run(command: Sequence[str], **options: object) -> SimpleNamespace:
        _, batches, target, weights = command[3:]
        assert weights in ("full", "seven")
        read.append(list(read_batches(Path(batches))))
        Path(target).write_bytes(b"model")
        Path(target).with_suffix(".bin").write_bytes(b"weights")
        return SimpleNamespace(returncode=0, stdout=json.dumps({"notes": ["said"]}), stderr="")

    monkeypatch.setattr("hqc.evaluation.bench.toolkits.subprocess.run", run)
    space = Workspace(tmp_path / "w")
    for tool in (NNCF, ONNXRUNTIME):
        model, notes = quantised_by(
            tool, tmp_path / "float.onnx", tmp_path / "float.hqc", Quantisation(calib_size=1, n_steps=2), space
        )
        assert model.read_bytes() == b"model"
        assert notes == ("said",)
    nncf, onnxruntime = read
    assert len(nncf) == 2  # timesteps
    assert nncf[0].keys() == {spec.name for spec in program.inputs}
    for one, other in zip(nncf, onnxruntime, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])
    kept = tmp_path / "w" / "openvino-int8"
    assert size_bytes(Built("openvino", kept / "model.xml")) == len(b"model") + len(b"weights")


@WITH_NNCF
@pytest.mark.long
def test_openvino_runs_what_nncf_quantised(captured: Captured, tmp_path: Path) -> None:
    """The whole way on a small network: integer layers in the file, an output near float's, figures of a process."""
    import openvino

    save_program(captured("cross_attention"), tmp_path / "float.hqc")
    result = bench(
        str(tmp_path / "float.hqc"),
        ["openvino-int8"],
        Workspace(tmp_path / "w"),
        quantisation=Quantisation("w8a8", calib_size=8, n_steps=2),
        timing=Timing(batch_size=2, threads=1, runs=1, warm_up=0),
    )
    assert result.failed == {}
    figures = result.peers["openvino-int8"]
    assert 1e-5 < figures.error_to_float < 0.2, figures.error_to_float
    folder = tmp_path / "w" / "openvino-int8"
    assert figures.size_bytes == sum((folder / name).stat().st_size for name in ("model.xml", "model.bin"))
    network = openvino.Core().read_model(folder / "model.xml")
    kinds = [node.get_type_name() for node in network.get_ops()]
    stored = [
        n for n in network.get_ops() if n.get_type_name() == "Constant" and n.get_element_type().to_string() == "i8"
    ]
    assert kinds.count("FakeQuantize") > 2
    assert len(stored) > 2
    assert figures.resident_bytes > figures.loaded.runtime_resident_bytes > 0
    precise = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert any("OpenVINO's choice" in note for note in figures.notes) is not precise


def test_the_same_program_in_the_other_runtime(captured: Captured, tmp_path: Path) -> None:
    """One export, of the program that is timed; where an export is timed there is none."""
    save_program(captured("cross_attention"), tmp_path / "float.hqc")
    wanted, space = Quantisation(calib_size=1, n_steps=2), Workspace(tmp_path / "w")
    models = find_models(str(tmp_path / "float.hqc"), None, wanted, space, "torch-int8")
    built = PEERS["hqc-onnxruntime"].build(models, wanted, space)
    assert (built.runtime, built.model) == ("onnxruntime", tmp_path / "w" / "integer" / "model.onnx")
    assert load_program(tmp_path / "w" / "quantised.hqc").plan.bits == "w4a4"
    manifest = json.loads((built.model.parent / "manifest.json").read_text())
    assert manifest["origin"]["source"] == "cross_attention"
    for quantised in (None, models.quantised):
        with pytest.raises(EvaluationError, match="is what is timed already"):
            PEERS["hqc-onnxruntime"].build(
                replace(models, export=built.model.parent, quantised=quantised), wanted, space
            )


def test_every_peer_says_what_it_is_and_most_need_nothing() -> None:
    for name in ("onnxruntime-fp32", "onnxruntime-int8", "torch"):
        PEERS[name].require()
    assert "torch.compile" in PEERS["torch-compile"].what
    assert "NNCF" in PEERS["openvino-int8"].what
