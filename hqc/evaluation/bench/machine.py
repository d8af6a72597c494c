"""What the machine is that the figures were measured on."""

import ctypes
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from hqc.machine import available_cores

__all__ = ["describe_gpu", "describe_machine", "has_vnni", "isa_flags", "machine_line"]

ISA = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
"""The flags that decide which integer kernels a runtime takes: x86 names, then Arm's."""

SMI_SECONDS = 10

PACKAGES = ("hqc", "torch", "triton", "onnxruntime", "openvino", "nncf", "numpy")


def describe_machine() -> dict[str, Any]:
    """CPU, cores, instruction sets, memory, operating system and versions, as JSON data. No host name."""
    cpuinfo = _cpuinfo()
    return {
        "cpu": _cpu_model(cpuinfo),
        "cores": available_cores(),
        "isa": list(isa_flags(cpuinfo)),
        "memory_bytes": int(psutil.virtual_memory().total),
        "os": _system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def describe_gpu() -> dict[str, Any]:
    """The current CUDA device as JSON data; what cannot be found out is None, whatever the reason.

    driver: the version of the display driver, such as "580.65.06"; driver_cuda: the newest CUDA that it serves.
    """
    import torch

    def properties() -> Any:
        return torch.cuda.get_device_properties(torch.cuda.current_device())

    return {
        "gpu": _found(lambda: str(properties().name)),
        "compute_capability": _found(lambda: f"{properties().major}.{properties().minor}"),
        "multiprocessors": _found(lambda: int(properties().multi_processor_count)),
        "gpu_memory_bytes": _found(lambda: int(properties().total_memory)),
        "l2_cache_bytes": _found(lambda: int(properties().L2_cache_size)),
        "cuda": _found(lambda: torch.version.cuda),
        "driver": _found(_driver),
        "driver_cuda": _found(_driver_cuda),
        "cudnn": _found(lambda: torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    }


def _found(find: Callable[[], Any]) -> Any:
    """A fact, or None: no description is worth the figures that it describes."""
    try:
        return find()
    except Exception:
        return None


def _driver() -> str | None:
    """As nvidia-smi says it, within a few seconds."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _driver_cuda() -> str | None:
    """As the driver's own library says it."""
    number = ctypes.c_int()
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def machine_line(machine: dict[str, Any]) -> str:
    """The description in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    isa = " ".join(machine["isa"]) or "no known ISA flags"
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    gpu = f"{machine['gpu'] or 'a GPU'}, CUDA {machine['cuda'] or 'unknown'}; " if "gpu" in machine else ""
    return f"{gpu}{machine['cpu']}, {machine['cores']} cores ({isa}), {memory}, {machine['os']}; {versions}"


def isa_flags(cpuinfo: str) -> tuple[str, ...]:
    """Those of `ISA` that /proc/cpuinfo lists ("flags" on x86, "Features" on Arm)."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return tuple(name for name in ISA if name in flags)


def has_vnni(isa: Iterable[str]) -> bool:
    """Whether u8 x s8 products accumulate in 32 bits: without that they saturate, and weights are given 7 bits."""
    return bool({"avx512_vnni", "avx_vnni", "amx_int8", "asimd"} & set(isa)) or platform.machine() in {
        "arm64",
        "aarch64",
    }


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu_model(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return (found[1] if found else platform.processor() or platform.machine()).strip()


def _system() -> str:
    if sys.platform != "linux":
        return platform.platform(terse=True)
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = "Linux"
    return f"{name}, Linux {platform.release().split('-')[0]}"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
