"""What can be exported, built and run on this machine; what is missing, and the line that installs it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hqc.engines.architectures import DEFAULT
from hqc.engines.architectures import RTX as RTX_ARCHS
from hqc.engines.builders import RTX, TRT, release
from hqc.engines.environment import Environment
from hqc.engines.known_bad import KnownBad, found_bad

__all__ = ["Ability", "Diagnosis", "diagnose"]

NO_GPU = "an NVIDIA GPU with its driver"
TENSORRT_LINE = "pip install tensorrt --extra-index-url https://pypi.nvidia.com"
RTX_LINE = "pip install 'hqc[rtx]'"
TORCH_LINE = "pip install torch --index-url https://download.pytorch.org/whl/cu130"


@dataclass(frozen=True)
class Ability:
    """One thing that hqc does, and whether it can be done here.

    missing: what is not there; install: the lines that bring what can be installed.
    """

    kind: str
    name: str
    missing: tuple[str, ...] = ()
    install: tuple[str, ...] = ()
    note: str = ""

    @property
    def ready(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "kind": self.kind,
            "name": self.name,
            "ready": self.ready,
            "missing": list(self.missing),
            "install": list(self.install),
            "note": self.note,
        }


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says."""

    environment: Environment
    abilities: tuple[Ability, ...]
    known_bad: tuple[KnownBad, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        bad = [{"name": b.name, "effect": b.effect, "do": b.do} for b in self.known_bad]
        return {
            **self.environment.to_dict(),
            "abilities": [ability.to_dict() for ability in self.abilities],
            "known_bad": bad,
        }


def diagnose(environment: Environment) -> Diagnosis:
    """Judges an environment."""
    return Diagnosis(environment, tuple(_abilities(environment)), found_bad(environment))


def _abilities(e: Environment) -> Iterator[Ability]:
    yield _ability("export", "portable, onnxruntime", _needs(e, "onnx", "onnxruntime"))
    yield _ability("export", "tensorrt", _needs(e, "onnx", "onnxruntime", "onnx_graphsurgeon"))
    yield _ability("export", "tensorrt with plugins", _needs(e, "onnx", "onnxruntime", "onnx_graphsurgeon", "triton"))
    yield _ability("build", "engine rtx", _rtx(e), note=f"without a GPU: {', '.join(RTX_ARCHS)}")
    yield _ability("build", "engine trt", [*_trt(e), *_gpu(e)], note="on the card that it is for")
    yield _ability("run", "torch", _needs(e, "torch"), note="the CPU")
    yield _ability("run", "torch-int8", _needs(e, "torch"), note="the CPU, a quantised program in int8 by oneDNN")
    yield _ability("run", "onnxruntime", _needs(e, "onnxruntime"), note="the CPU")
    yield _ability("run", "torch on CUDA", [*_torch_cuda(e), *_needs(e, "triton"), *_gpu(e)])
    yield _ability("run", "engine rtx", [*_rtx(e), *_gpu(e), *_rtx_card(e)])
    yield _ability("run", "engine trt", [*_trt(e), *_gpu(e)])


Need = tuple[str, str]
"""What is missing, and the line that installs it; empty where there is none."""

_LINES = {
    "triton": "pip install 'hqc[gpu]'",
    "onnx_graphsurgeon": "pip install onnx-graphsurgeon",
}


def _ability(kind: str, name: str, needs: list[Need], note: str = "") -> Ability:
    lines = dict.fromkeys(line for _, line in needs if line)
    return Ability(kind, name, tuple(what for what, _ in needs), tuple(lines), note)


def _needs(e: Environment, *names: str) -> list[Need]:
    return [(name, _LINES.get(name, f"pip install {name}")) for name in names if not e.has(name)]


def _rtx(e: Environment) -> list[Need]:
    if e.system == "Darwin":
        return [("tensorrt-rtx, which has no wheel for macOS", "")]
    return _package(e, "tensorrt_rtx", RTX.packages[0], RTX.oldest, RTX_LINE)


def _trt(e: Environment) -> list[Need]:
    return _package(e, "tensorrt", TRT.packages[0], TRT.oldest, TENSORRT_LINE)


def _package(e: Environment, name: str, package: str, oldest: str, line: str) -> list[Need]:
    found = e.versions.get(name)
    if found is None:
        return [(package, line)]
    return [(f"{package} {oldest} or newer (found {found})", line)] if release(found) < release(oldest) else []


def _gpu(e: Environment) -> list[Need]:
    return [] if e.driver is not None and e.driver.gpus else [(NO_GPU, "")]


def _rtx_card(e: Environment) -> list[Need]:
    gpus = e.driver.gpus if e.driver is not None else ()
    if not gpus or any(gpu.arch in RTX_ARCHS for gpu in gpus):
        return []
    return [(f"a GPU that TensorRT-RTX builds for ({', '.join(DEFAULT)})", "")]


def _torch_cuda(e: Environment) -> list[Need]:
    if not e.has("torch"):
        return [("torch", TORCH_LINE)]
    return [] if e.torch_cuda else [("torch built with CUDA", TORCH_LINE)]
