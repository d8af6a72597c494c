"""Programs that load and cannot be run: every command says in one line which node cannot be computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from test_cli import refused
from torch import Tensor, nn

from hqc.capture import Source, capture_module, trace
from hqc.errors import CaptureError, EvaluationError, MemoryShortError
from hqc.evaluation.stepping import Run
from hqc.export.ort_session import open_session, run_session
from hqc.program import InputSpec, Origin, Program
from hqc.running import run_module
from hqc.runtimes.torch_runtime import TorchSession
from hqc.storage import load_program, save_program

BROKEN = "node 'embedding' (aten.embedding.default): cannot be computed (index out of range in self). An input is"


class _Looked(nn.Module):
    """Looks a row up whose number is a weight: 1, or what a stranger has written there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 1)
        self.table = nn.Embedding(4, 8)
        self.register_buffer("row", torch.tensor([1]))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.first(sample) + self.table(self.row)[:, :, None, None] + timestep[:, None, None, None] / 1000
        return self.last(self.middle(x).relu())  # type: ignore[no-any-return]


def looked_up() -> Program:
    inputs = (InputSpec("sample", ("N", 4, 8, 8)), InputSpec("timestep", ("N",)))
    return trace(Source(_Looked(), inputs, Origin(source="looked_up", kind="_Looked")))


def broken() -> Program:
    program = looked_up()
    return program.evolve(state={**program.state, "row": torch.tensor([99])})


def test_it_is_right_with_a_row_that_is_there() -> None:
    program = looked_up()
    args = program.example_inputs(2)
    assert torch.equal(run_module(program.module(), *args), _Looked()(*args))


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda program, args: TorchSession(program)(*args), id="session"),
        pytest.param(lambda program, args: _stepped(Run(program), args), id="stepping"),
    ],
)
def test_the_node_is_named(run: Callable[[Program, Any], Tensor], capfd: pytest.CaptureFixture[str]) -> None:
    program = broken()
    with pytest.raises(EvaluationError) as found:
        run(program, program.example_inputs(2))
    assert str(found.value).startswith(BROKEN)
    assert capfd.readouterr() == ("", "")


def _stepped(run: Run, args: tuple[Tensor, ...]) -> Tensor:
    return run.finish(run.start(args))


@pytest.mark.parametrize(
    "line",
    [
        "ptq {p} -o x --synthetic --calib-size 1 --n-steps 2",
        "qat {p} -o x --synthetic --calib-size 1 --n-steps 2 --steps 1 --batch-size 1",
        "export {p} -o x",
        "export {p} -o x --target portable",
        "export {p} -o x --target tensorrt",
        "compare {p} {p} --inputs noise",
        "analyze {p} --synthetic --calib-size 1 --n-steps 2",
    ],
)
def test_every_command_says_it_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    save_program(broken(), tmp_path / "p.hqc")
    load_program(tmp_path / "p.hqc")
    monkeypatch.chdir(tmp_path)
    said = refused(tmp_path, *line.format(p="p.hqc").split())
    assert said.startswith((BROKEN, "onnxruntime: cannot run the model (")), said
    assert len(said) <= 300


def test_an_export_that_cannot_be_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """onnxruntime prints nothing besides."""
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (int64[1] row) => (float[1,2] out) '
        "<float[2,2] table = {1, 2, 3, 4}> { out = Gather(table, row) }"
    )
    onnx.save(graph, str(tmp_path / "model.onnx"))
    session = open_session(tmp_path / "model.onnx")
    with pytest.raises(EvaluationError, match=r"^onnxruntime: cannot run .*\. Check the inputs; give labels"):
        run_session(session, ["out"], {"row": torch.tensor([7]).numpy()})
    assert capfd.readouterr() == ("", "")


def test_memory_that_runs_out_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    module = looked_up().module()
    monkeypatch.setattr(module, "forward", full)
    with pytest.raises(MemoryShortError, match="there is not enough memory for it"):
        run_module(module)


def test_a_module_that_does_not_take_random_numbers() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 4)

        def forward(self, sample: Tensor, label: Tensor) -> Tensor:
            return sample + self.table((100 * label).long())  # type: ignore[no-any-return]

    inputs = (InputSpec("sample", ("N", 4)), InputSpec("label", ("N",)))
    with pytest.raises(CaptureError, match=r"cannot be run on random inputs \(IndexError: index out of range"):
        capture_module(Labelled(), inputs)
