"""What the machine is that the figures were measured on."""

import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

__all__ = ["available_cores", "describe_gpu", "describe_machine", "has_vnni", "isa_flags", "machine_line"]

ISA = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
"""The flags that decide which integer kernels a runtime takes: x86 names, then Arm's."""

PACKAGES = ("hqc", "torch", "triton", "onnxruntime", "numpy")


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    """The current CUDA device as JSON data: its name, compute capability, multiprocessors, memory, CUDA and driver."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 13000 for CUDA 13.0
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The description in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    isa = " ".join(machine["isa"]) or "no known ISA flags"
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    gpu = f"{machine['gpu']}, CUDA {machine['cuda']}; " if "gpu" in machine else ""
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
