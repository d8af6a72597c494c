"""Real exports for TensorRT: run by ONNX Runtime on this machine, and by their engine where there is a GPU for it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from integer_programs import quantised

from hqc.engines.builders import RTX, TRT
from hqc.errors import RuntimeMissingError
from hqc.export import export_program
from hqc.export.tensorrt.options import TensorRtOptions
from hqc.program import Program
from hqc.runtimes import load
from hqc.runtimes.torch_runtime import TorchSession
from hqc.runtimes.trt.plans import PlanOptions, find_gpu
from hqc.runtimes.trt.session import TensorRtSession


@pytest.fixture(scope="module")
def program(captured: Callable[[str], Program]) -> Program:
    return quantised(captured("two_sites"), "w4a4")


def _without_gpu() -> bool:
    try:
        find_gpu()
    except RuntimeMissingError:
        return True
    return False


@pytest.mark.skipif(not _without_gpu(), reason="this machine has a GPU, where tensorrt is picked")
@pytest.mark.parametrize("plugins", ["none", "qdp"])
def test_onnxruntime_runs_it_without_a_gpu(plugins: str, program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    # The nodes' bodies run, not the kernels: those need not be compiled.
    options = TensorRtOptions(dtype="fp32", plugins=plugins, plugin_archs=())
    export_program(program, "tensorrt", folder, tensorrt=options)
    model = load(folder, threads=1)
    assert model.runtime == "onnxruntime"
    inputs = program.example_inputs(3, seed=3)
    found, wanted = model.session(*inputs), TorchSession(program)(*inputs)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5  # float32, no code at a rounding boundary
    assert float(wanted.std()) > 0
    with pytest.raises(RuntimeMissingError, match=r"runtime tensorrt: there is no NVIDIA driver here|finds no GPU"):
        load(folder, runtime="tensorrt")


def test_the_real_runtime_of_rtx_refuses_what_is_no_plan() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this platform")
    code = """
import tensorrt_rtx, torch
from hqc.errors import ArtefactError
from hqc.runtimes.trt.engine import Engine
for _ in range(2):
    try:
        Engine(tensorrt_rtx, b"no plan" * 1000, "engine.plan", "Build it again.", torch.device("cpu"))
    except ArtefactError as error:
        print(error)
"""
    # A process of its own: without a driver, the library logs to the standard streams and may not end well.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("engine.plan: cannot be loaded (")]
    assert len(lines) == 2, done.stdout + done.stderr
    assert all(line.endswith("). Build it again.") and "no reason was given" not in line for line in lines)


# ---- on a GPU ------------------------------------------------------------------------------------------------------


def _builder() -> str | None:
    """What can build and run an engine here."""
    for builder in (TRT, RTX):
        try:
            builder.installed()
        except RuntimeMissingError:
            continue
        return builder.name
    return None


engine = pytest.mark.skipif(_builder() is None, reason="neither tensorrt nor tensorrt-rtx is installed")


@pytest.mark.gpu
@engine
@pytest.mark.parametrize("graphs", [0, 2])
def test_an_engine_agrees_with_torch(graphs: int, program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export_program(program, "tensorrt", folder, tensorrt=TensorRtOptions(dtype="fp32"))
    session = TensorRtSession(folder, PlanOptions(builder=_builder()), graphs=graphs)
    reference = TorchSession(program)
    for batch in (1, 3, 8, 3):
        sample, timestep, *conditions = program.example_inputs(batch, seed=batch)
        wanted = reference(sample, timestep, *conditions)
        found = session(sample.cuda(), timestep.cuda(), *(c.cuda() for c in conditions))
        assert found.is_cuda
        # TF32 rounds operands to 2^-11, and a code at a boundary may step: a tenth of the output at most.
        assert float((found.cpu() - wanted).norm() / wanted.norm()) <= 0.1
        assert torch.equal(session(sample, timestep, *conditions), found.cpu())


@pytest.mark.gpu
@engine
def test_one_graph_serves_every_timestep(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export_program(program, "tensorrt", folder, tensorrt=TensorRtOptions(dtype="fp32"))
    session = TensorRtSession(folder, PlanOptions(builder=_builder()))
    sample, _, *conditions = (value.cuda() for value in program.example_inputs(4, seed=3))
    mixed = torch.tensor([0.0, 300.0, 900.0, 300.0]).cuda()
    together = session(sample, mixed, *conditions)
    assert not torch.equal(together[1], session(sample, torch.zeros(4), *conditions)[1])
    for row, time in enumerate(mixed.tolist()):
        alone = session(sample, torch.full((4,), time), *conditions)
        assert torch.equal(alone[row], together[row])


@pytest.mark.gpu
@pytest.mark.skipif(_builder() != "trt", reason="tensorrt is not installed: tensorrt-rtx takes no plugins")
def test_an_engine_with_plugins_agrees_with_torch(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export_program(
        program, "tensorrt", folder, tensorrt=TensorRtOptions(plugins="qdp", plugin_archs=(find_gpu().arch,))
    )
    session = TensorRtSession(folder)
    sample, timestep, *conditions = program.example_inputs(4, seed=3)
    wanted = TorchSession(program)(sample, timestep, *conditions)
    found = session(sample.cuda(), timestep.cuda(), *(c.cuda() for c in conditions)).cpu()
    assert float((found - wanted).norm() / wanted.norm()) <= 0.1  # as above, with float16 between the sites
