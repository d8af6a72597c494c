"""The NVIDIA GPUs of this machine, from the driver's own library: no torch, no subprocess, nothing where none is."""

import ctypes
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hqc.engines.architectures import Capability, arch_name

__all__ = ["Driver", "Gpu", "find_driver"]

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    compute_capability: Capability
    memory_bytes: int

    @property
    def arch(self) -> str:
        """As in `sm_90`."""
        return arch_name(self.compute_capability)


@dataclass(frozen=True)
class Driver:
    """The driver: the newest CUDA that it serves, its own version (empty where it is not told), and its GPUs."""

    cuda: tuple[int, int]
    version: str
    gpus: tuple[Gpu, ...]


@cache
def find_driver() -> Driver | None:
    """The driver, if one is installed and starts; its GPUs in the order in which CUDA numbers them."""
    library = _load()
    if library is None or library.cuInit(0) != 0:
        return None
    return Driver(_cuda_version(library), _driver_version(), tuple(_gpus(library)))


def _load() -> Any:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def _cuda_version(library: Any) -> tuple[int, int]:
    """13000 is 13.0."""
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def _gpus(library: Any) -> Iterator[Gpu]:
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        library.cuDeviceGet(ctypes.byref(device), index)
        library.cuDeviceGetName(name, len(name), device)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        major, minor = (_attribute(library, which, device) for which in (_MAJOR, _MINOR))
        yield Gpu(name.value.decode(errors="replace"), (major, minor), memory.value)


def _attribute(library: Any, which: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    library.cuDeviceGetAttribute(ctypes.byref(value), which, device)
    return value.value


def _driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Such as 580.95.05, as the kernel module says it; empty elsewhere."""
    try:
        found = re.search(r"Kernel Module.*?(\d+\.\d+(\.\d+)?)", path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return found[1] if found else ""
