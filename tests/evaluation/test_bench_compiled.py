"""The compiled float peer as far as it goes without a GPU: what is compiled, what is refused."""

import sys
from pathlib import Path

import pytest
import torch

from hqc.errors import RuntimeMissingError
from hqc.runtimes.integer.build import BuildOptions, float_module
from hqc.runtimes.integer.cuda import compiled as compiling
from hqc.runtimes.integer.cuda.compiled import CompiledHalfSession, compiled, require_torch_compile
from hqc.runtimes.integer.cuda.graphs import Captured, GraphCache

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize("name", ["two_sites", "single_key", "in_place"])
def test_the_float_module_compiles_in_one_piece_and_computes_the_same(captured, name: str) -> None:
    """Dynamo's part, which does not depend on the device; through the cache that captures one graph a batch size."""
    program = captured(name)
    module = float_module(program, BuildOptions(torch.device("cpu"), torch.float32))
    made = compiled(module, backend="eager")
    assert isinstance(made, torch._dynamo.eval_frame.OptimizedModule)
    captures = []

    def capture(call, inputs) -> Captured:
        captures.append(inputs[0].shape[0])
        output = call(*inputs)
        return Captured(inputs, output, lambda: output.copy_(call(*inputs)))

    cache = GraphCache(made, capture)
    with torch.no_grad():
        for batch in (1, 2, 1):
            inputs = program.example_inputs(batch, seed=batch)
            torch.testing.assert_close(cache(list(inputs)), program.module()(*inputs), rtol=1e-4, atol=1e-4)
    assert captures == [1, 2]


@WITHOUT_GPU
def test_without_a_gpu_one_line(captured) -> None:
    with pytest.raises(RuntimeMissingError, match="CUDA"):
        CompiledHalfSession(captured("two_sites"))


def test_without_triton_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeMissingError, match=r"torch-fp16-compile: torch.compile needs triton"):
        require_torch_compile()


def test_without_a_c_compiler_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeMissingError, match=r"needs a C compiler; finds none of cc, gcc, clang"):
        require_torch_compile()
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(RuntimeMissingError, match=r"CC names /nowhere/cc, which is not there"):
        require_torch_compile()
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.delenv("CC")
    require_torch_compile()
    assert compiling.COMPILERS[1] == "gcc"
