"""The doctor: every known-bad combination by itself, what is ready and what is missing, and the command."""

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from hqc import __version__
from hqc.cli import main
from hqc.engines import environment as environment_module
from hqc.engines import gpus
from hqc.engines.doctor import Ability, diagnose
from hqc.engines.environment import Environment, find_environment
from hqc.engines.gpus import Driver, Gpu
from hqc.engines.known_bad import KNOWN_BAD, found_bad


def machine(arch: tuple[int, int] | None = None, cuda: tuple[int, int] = (13, 0), **versions: str) -> Environment:
    gpus = (Gpu("card", arch, 80 * 2**30),) if arch else ()
    named = {name.replace("_gpu", "-gpu"): version for name, version in versions.items()}
    return Environment("3.11.7", "Linux", "x86_64", named, "13.0", Driver(cuda, "580.95.05", gpus) if arch else None)


# Name of a combination -> an environment that has it, and neighbours that do not.
CASES: dict[str, tuple[Environment, tuple[Environment, ...]]] = {
    "triton 3.6 with numpy 2.4 or newer": (
        machine(triton="3.6.0", numpy="2.4.6"),
        (machine(triton="3.6.0", numpy="2.3.5"), machine(triton="3.9.0", numpy="2.4.6"), machine(numpy="2.4.6")),
    ),
    "tensorrt 10 with numpy 2.4 or newer": (
        machine(tensorrt="10.16.1.11", numpy="2.4.0"),
        (machine(tensorrt="11.4.0.106", numpy="2.4.0"), machine(tensorrt="10.16.1.11", numpy="2.3.5")),
    ),
    "tensorrt-rtx with a GPU that it does not build for": (
        machine((9, 0), tensorrt_rtx="1.7.1.116"),
        (machine((8, 9), tensorrt_rtx="1.7.1.116"), machine((9, 0)), machine(tensorrt_rtx="1.7.1.116")),
    ),
    "tensorrt-rtx with sm_75": (
        machine((7, 5), tensorrt_rtx="1.7.1.116"),
        (machine((8, 0), tensorrt_rtx="1.7.1.116"), machine((7, 5))),
    ),
    "triton 3.9 with a driver older than CUDA 13.4": (
        machine((9, 0), triton="3.9.0"),
        (
            machine((9, 0), (13, 4), triton="3.9.0"),
            machine((8, 9), triton="3.9.0"),
            machine((9, 0), triton="3.6.0"),
            machine(triton="3.9.0"),
        ),
    ),
    "triton 3.7 on Blackwell with a driver older than CUDA 13.1": (
        machine((12, 0), triton="3.7.1"),
        (machine((9, 0), triton="3.7.1"), machine((12, 0), (13, 1), triton="3.7.1"), machine((12, 0), triton="3.6.0")),
    ),
    "onnxruntime-gpu's TensorRT provider with tensorrt 11": (
        machine(onnxruntime_gpu="1.31.1", tensorrt="11.4.0.106"),
        (machine(onnxruntime_gpu="1.31.1", tensorrt="10.16.1"), machine(onnxruntime="1.32.0", tensorrt="11.4")),
    ),
    "onnxruntime 1.27 to 1.32 with int8 Q/DQ followed by a Transpose or Reshape at opset 21 or later": (
        machine(onnxruntime="1.32.0"),
        (machine(onnxruntime="1.26.1"), machine(onnxruntime="1.33.0"), machine()),
    ),
    "tensorrt older than 10.8": (machine(tensorrt="10.7.0"), (machine(tensorrt="10.8.0.43"), machine())),
    "torch built for a newer CUDA than the driver's": (
        machine((9, 0), (12, 8)),
        (machine((9, 0), (13, 0)), replace(machine((9, 0), (12, 8)), torch_cuda=""), machine()),
    ),
}


def test_every_combination_has_a_case_and_a_text() -> None:
    assert [bad.name for bad in KNOWN_BAD] == list(CASES)
    assert all(bad.effect and bad.do for bad in KNOWN_BAD)


@pytest.mark.parametrize("name", CASES)
def test_a_combination_is_found_where_it_is_and_nowhere_else(name: str) -> None:
    has, lacks = CASES[name]
    assert name in [bad.name for bad in found_bad(has)]
    for neighbour in lacks:
        assert name not in [bad.name for bad in found_bad(neighbour)]


# ---- abilities -----------------------------------------------------------------------------------------------------

FULL = machine(
    (8, 9),
    torch="2.13.0",
    onnx="1.23.2",
    onnxruntime="1.32.0",
    onnx_graphsurgeon="0.6.1",
    tensorrt="11.4.0.106",
    tensorrt_rtx="1.7.1.116",
    triton="3.9.0",
)


def abilities(environment: Environment) -> dict[str, Ability]:
    return {f"{ability.kind} {ability.name}": ability for ability in diagnose(environment).abilities}


def without(*names: str) -> Environment:
    return replace(FULL, versions={name: v for name, v in FULL.versions.items() if name not in names})


def test_with_everything_there_everything_is_ready() -> None:
    assert [a for a in abilities(FULL).values() if not a.ready] == []


@pytest.mark.parametrize(
    ("environment", "ability", "missing", "install"),
    [
        (without("tensorrt_rtx"), "build engine rtx", "tensorrt-rtx", "pip install 'hqc[rtx]'"),
        (
            without("tensorrt"),
            "build engine trt",
            "tensorrt",
            "pip install tensorrt --extra-index-url https://pypi.nvidia.com",
        ),
        (replace(FULL, driver=None), "build engine trt", "an NVIDIA GPU with its driver", None),
        (replace(FULL, driver=None), "run engine rtx", "an NVIDIA GPU with its driver", None),
        (
            replace(FULL, driver=Driver((13, 0), "", (Gpu("H200", (9, 0), 1),))),
            "run engine rtx",
            "a GPU that TensorRT-RTX builds for (sm_80, sm_86, sm_89, sm_120)",
            None,
        ),
        (replace(FULL, system="Darwin"), "build engine rtx", "tensorrt-rtx, which has no wheel for macOS", None),
        (
            replace(FULL, torch_cuda=""),
            "run torch on CUDA",
            "torch built with CUDA",
            "pip install torch --index-url https://download.pytorch.org/whl/cu130",
        ),
        (without("triton"), "run torch on CUDA", "triton", "pip install 'hqc[gpu]'"),
        (without("triton"), "export tensorrt with plugins", "triton", "pip install 'hqc[gpu]'"),
        (without("onnx_graphsurgeon"), "export tensorrt", "onnx_graphsurgeon", "pip install onnx-graphsurgeon"),
        (without("onnxruntime"), "run onnxruntime", "onnxruntime", "pip install onnxruntime"),
        (
            replace(FULL, versions={**FULL.versions, "tensorrt": "10.7.0"}),
            "run engine trt",
            "tensorrt 10.8 or newer (found 10.7.0)",
            "pip install tensorrt --extra-index-url https://pypi.nvidia.com",
        ),
    ],
    ids=str,
)
def test_what_is_missing_is_named_with_its_line(
    environment: Environment, ability: str, missing: str, install: str | None
) -> None:
    found = abilities(environment)[ability]
    assert not found.ready
    assert found.missing == (missing,)
    assert found.install == ((install,) if install else ())


# ---- this machine --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpus, "_load", lambda: None)
    gpus.find_driver.cache_clear()
    yield
    gpus.find_driver.cache_clear()


@pytest.mark.usefixtures("no_driver")
def test_the_environment_is_that_of_the_process() -> None:
    import onnx
    import torch

    found = find_environment()
    assert found.versions["torch"] == torch.__version__
    assert found.versions["onnx"] == onnx.__version__
    assert found.torch_cuda == (torch.version.cuda or "")
    assert found.driver is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip = None\n", "13.0"),
        ("cuda: Optional[str] = None\n", ""),
        ("cuda = '12.8'\n", "12.8"),
    ],
)
def test_the_cuda_of_torch_is_read_from_its_version_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, wanted: str
) -> None:
    (tmp_path / "version.py").write_text(text)

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(environment_module, "find_spec", lambda name: Spec)
    assert environment_module._torch_cuda() == wanted
    monkeypatch.setattr(environment_module, "find_spec", lambda name: None)
    assert environment_module._torch_cuda() == ""


class Library:
    """A driver with two cards, as ctypes calls it."""

    CARDS = (("NVIDIA H200", 9, 0, 150_754_820_096), ("NVIDIA L4", 8, 9, 24_000_000_000))

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDriverGetVersion(self, number: object) -> None:
        number._obj.value = 13010  # type: ignore[attr-defined]

    def cuDeviceGetCount(self, count: object) -> None:
        count._obj.value = 2  # type: ignore[attr-defined]

    def cuDeviceGet(self, device: object, index: int) -> None:
        device._obj.value = index  # type: ignore[attr-defined]

    def cuDeviceGetName(self, name: "ctypes.Array[ctypes.c_char]", size: int, device: ctypes.c_int) -> None:
        name.value = self.CARDS[device.value][0].encode()

    def cuDeviceTotalMem_v2(self, memory: object, device: ctypes.c_int) -> None:
        memory._obj.value = self.CARDS[device.value][3]  # type: ignore[attr-defined]

    def cuDeviceGetAttribute(self, value: object, which: int, device: ctypes.c_int) -> None:
        value._obj.value = self.CARDS[device.value][{75: 1, 76: 2}[which]]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_driver")
def test_cards_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_load", Library)
    driver = gpus.find_driver()
    assert driver is not None
    assert driver.cuda == (13, 1)
    assert driver.gpus == (Gpu("NVIDIA H200", (9, 0), 150_754_820_096), Gpu("NVIDIA L4", (8, 9), 24_000_000_000))
    assert [gpu.arch for gpu in driver.gpus] == ["sm_90", "sm_89"]


@pytest.mark.usefixtures("no_driver")
def test_a_driver_that_does_not_start_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_load", lambda: Library(status=100))
    assert gpus.find_driver() is None


def test_the_version_of_the_kernel_module(tmp_path: Path) -> None:
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\nGCC 13\n")
    assert gpus._driver_version(path) == "580.95.05"
    assert gpus._driver_version(tmp_path / "none") == ""


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_driver")
def test_the_command_prints_json() -> None:
    done = CliRunner(catch_exceptions=False).invoke(main, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["hqc"] == __version__
    assert said["cuda_driver"] is None
    assert said["gpus"] == []
    assert said["versions"]["numpy"]
    built = next(a for a in said["abilities"] if a["name"] == "engine trt" and a["kind"] == "build")
    assert built["ready"] is False
    assert all({"name", "effect", "do"} == set(bad) for bad in said["known_bad"])


def test_the_command_prints_text(monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(
        without("tensorrt", "onnxruntime"), driver=Driver((13, 0), "580.95.05", (Gpu("H200", (9, 0), 10**9),))
    )
    monkeypatch.setattr(environment_module, "find_environment", lambda: here)
    text = CliRunner(catch_exceptions=False).invoke(main, ["doctor"]).stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "tensorrt not installed" in lines
    assert "torch 2.13.0, CUDA 13.0" in lines
    assert "CUDA driver 580.95.05, CUDA 13.0" in lines
    assert "0 H200, sm_90, 1.0 GB" in lines
    assert "yes build engine rtx (without a GPU: sm_75, sm_80, sm_86, sm_89, sm_120, sm_121)" in lines
    assert "no run onnxruntime: needs onnxruntime; `pip install onnxruntime`" in lines
    assert any(line.startswith("tensorrt-rtx with a GPU that it does not build for: ") for line in lines)
    assert "none found" not in lines


def test_nothing_bad_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "find_environment", lambda: machine())
    text = CliRunner(catch_exceptions=False).invoke(main, ["doctor"]).stdout
    assert text.rstrip().endswith("none found")
    assert "no NVIDIA GPU, or no driver" in text


def test_a_broken_package_does_not_stop_it() -> None:
    """It must say that torch is broken; it cannot if it imports torch."""
    broken = "; ".join(f"sys.modules[{name!r}] = None" for name in ("torch", "numpy", "onnx", "onnxruntime"))
    code = f"import sys; {broken}; from hqc.cli import main; main(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["torch"]
