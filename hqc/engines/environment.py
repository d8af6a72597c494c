"""What is installed on this machine, without importing any of it: packages, CUDA of torch, driver, GPUs."""

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hqc import __version__
from hqc.engines.builders import RTX, TRT, package_version
from hqc.engines.gpus import Driver, find_driver

__all__ = ["Environment", "find_environment"]

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "tensorrt": TRT.packages,
    "tensorrt_rtx": RTX.packages,
    "triton": ("triton",),
    "onnx_graphsurgeon": ("onnx-graphsurgeon",),
}
"""Name -> distributions that bring it."""


@dataclass(frozen=True)
class Environment:
    """Facts that the doctor judges.

    versions: name -> version; what is not installed is not there.
    torch_cuda: the CUDA that torch was built with, empty for a build for the CPU.
    """

    python: str
    system: str
    machine: str
    versions: Mapping[str, str] = field(default_factory=dict)
    torch_cuda: str = ""
    driver: Driver | None = None

    def has(self, name: str) -> bool:
        """Whether a package is installed."""
        return name in self.versions

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        driver = self.driver
        return {
            "hqc": __version__,
            "python": self.python,
            "system": self.system,
            "machine": self.machine,
            "versions": {name: self.versions.get(name) for name in PACKAGES},
            "torch_cuda": self.torch_cuda or None,
            "cuda_driver": {"version": driver.version or None, "cuda": "{}.{}".format(*driver.cuda)}
            if driver
            else None,
            "gpus": [
                {"name": gpu.name, "arch": gpu.arch, "memory_bytes": gpu.memory_bytes}
                for gpu in (driver.gpus if driver else ())
            ],
        }


def find_environment() -> Environment:
    """The facts of this machine."""
    versions = {
        name: version
        for name, distributions in PACKAGES.items()
        if (version := next(filter(None, map(package_version, distributions)), None)) is not None
    }
    return Environment(
        python=platform.python_version(),
        system=platform.system(),
        machine=platform.machine(),
        versions=versions,
        torch_cuda=_torch_cuda(),
        driver=find_driver(),
    )


def _torch_cuda() -> str:
    """`13.0` from the line `cuda: Optional[str] = '13.0'` of torch/version.py: importing torch takes seconds."""
    spec = find_spec("torch")
    folders = spec.submodule_search_locations if spec is not None else None
    try:
        text = (Path(next(iter(folders or ()))) / "version.py").read_text(encoding="utf-8")
    except (OSError, StopIteration):
        return ""
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else ""
