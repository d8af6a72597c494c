"""plugins.json: the kernels of an export, compiled for several architectures, and which of them a node may run.

    plugins.json    {"format", "version", "hqc", "triton", "variants": {key: [kernel, …]}, "kernels": {kernel: {…}}}
    *.ptx           one file a kernel and architecture, listed there with its sha256

The kernels of a variant are its tactics 1, 2, …: TensorRT times each and keeps the fastest.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .driver import driver_cuda
from .problems import MissingError, PluginError

__all__ = ["FORMAT", "PLUGINS_FILE", "VERSION", "Kernel", "KernelTable", "Kernels", "choose_arch", "read_table"]

AGAIN = "Export the model again."
PLUGINS_FILE = "plugins.json"
FORMAT = "hqc-plugins"
VERSION = 3
READABLE = (2, 3)
"""2: nodes are told the kind of their rotation, `regular`. 3: `HadamardQuantizeBounded` is new, no more."""

_CUDA_OF_ISA: Mapping[tuple[int, int], tuple[int, int]] = {
    **{(8, minor): (12, minor) for minor in range(6)},
    (8, 6): (12, 7),
    (8, 7): (12, 8),
    (8, 8): (12, 9),
}
"""The CUDA of the first driver that loads a PTX ISA; from 9.0 on both have the same numbers, plus 4."""


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture: PTX with one entry point, and how it is launched.

    tile: rows and columns of the output that a program computes. parameters: of the entry point, the two that triton
    adds at the end included. shared_bytes: dynamic shared memory.
    """

    name: str
    entry: str
    ptx: bytes
    target: str
    tile: tuple[int, int]
    num_warps: int
    shared_bytes: int
    parameters: int

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * self.num_warps


class Kernels(Protocol):
    """Where plugins find their kernels."""

    def tactics(self, key: str) -> tuple[Kernel, ...]:
        """The kernels of a variant.

        Raises:
            PluginError: if there is none.
        """
        ...


@dataclass(frozen=True)
class KernelTable:
    """The kernels of one export for one architecture."""

    folder: Path
    arch: str
    variants: Mapping[str, tuple[Kernel, ...]]

    def tactics(self, key: str) -> tuple[Kernel, ...]:
        """See `Kernels`."""
        if key not in self.variants:
            raise PluginError(str(self.folder / PLUGINS_FILE), f"holds no kernel for `{key}`", AGAIN)
        return self.variants[key]


def read_table(folder: Path, capability: tuple[int, int]) -> KernelTable:
    """Reads plugins.json and the PTX for a compute capability, checking every hash and what the driver can load.

    Raises:
        PluginError: if there is none, it is damaged, of another version, or for other GPUs.
    """
    path = folder / PLUGINS_FILE
    data = _read_json(path)
    if data.get("format") != FORMAT or data.get("version") not in READABLE:
        expected = f"{FORMAT!r} version {' or '.join(map(str, READABLE))}"
        found = f"holds {data.get('format')!r} version {data.get('version')!r}, expected {expected}"
        raise PluginError(str(path), found, AGAIN)
    try:
        listed, variants = data["kernels"], data["variants"]
        archs = {arch: build["target"] for kernel in listed.values() for arch, build in kernel["archs"].items()}
        if not archs:
            raise ValueError("no kernels")
        arch = choose_arch(archs, capability, str(path))
        kernels = {name: _kernel(folder, name, entry, arch) for name, entry in listed.items()}
        tactics = {key: tuple(kernels[name] for name in names) for key, names in variants.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PluginError(str(path), f"is not what hqc writes ({error!r})", AGAIN) from error
    return KernelTable(folder, arch, tactics)


def choose_arch(targets: Mapping[str, str], capability: tuple[int, int], where: str) -> str:
    """The architecture to load: that of the GPU, else the newest older one whose PTX is not bound to its own chip.

    targets: architecture -> PTX target; one that ends with a letter, such as sm_90a, runs on no other chip.

    >>> choose_arch({"sm_80": "sm_80", "sm_90": "sm_90a"}, (9, 0), "")
    'sm_90'
    >>> choose_arch({"sm_80": "sm_80", "sm_86": "sm_86", "sm_90": "sm_90a"}, (8, 7), "")
    'sm_86'

    Raises:
        PluginError: if there is none.
    """
    own = f"sm_{capability[0]}{capability[1]}"
    if own in targets:
        return own
    older = {_capability(arch): arch for arch, target in targets.items() if target[-1].isdigit()}
    fitting = [found for found in older if found <= capability]
    if not fitting:
        raise PluginError(
            where, f"holds kernels for {', '.join(sorted(targets))}, none for {own}", f"Export for {own}."
        )
    return older[max(fitting)]


def _capability(arch: str) -> tuple[int, int]:
    digits = arch.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PluginError(str(path), "is missing", "Export the model with --plugins qdp.") from error
    except (OSError, ValueError) as error:
        raise PluginError(str(path), f"cannot be read ({error})", AGAIN) from error
    if not isinstance(data, dict):
        raise PluginError(str(path), f"holds a {type(data).__name__}", AGAIN)
    return data


def _kernel(folder: Path, name: str, listed: Mapping[str, Any], arch: str) -> Kernel:
    build = listed["archs"][arch]
    _check_isa(folder / build["file"], build["ptx_isa"])
    return Kernel(
        name=name,
        entry=str(build["entry"]),
        ptx=_read_ptx(folder, str(build["file"]), str(build["sha256"])),
        target=str(build["target"]),
        tile=(int(listed["tile"][0]), int(listed["tile"][1])),
        num_warps=int(listed["num_warps"]),
        shared_bytes=int(build["shared_bytes"]),
        parameters=int(listed["parameters"]),
    )


def _read_ptx(folder: Path, file: str, sha256: str) -> bytes:
    path = folder / file
    if Path(file).name != file or path.is_symlink():
        raise PluginError(str(folder / PLUGINS_FILE), f"names {file!r}, outside its folder", "Do not use this export.")
    try:
        ptx = path.read_bytes()
    except OSError as error:
        raise PluginError(str(path), f"cannot be read ({error.strerror})", "Copy the whole folder again.") from error
    if hashlib.sha256(ptx).hexdigest() != sha256:
        raise PluginError(str(path), f"is damaged: its sha256 is not that of {PLUGINS_FILE}", "Copy the folder again.")
    return ptx


def _check_isa(path: Path, isa: str) -> None:
    """Refuses PTX that the driver here is too old to load; TensorRT would say so at the first inference only."""
    major, minor = (int(part) for part in isa.split("."))
    needed = _CUDA_OF_ISA.get((major, minor), (major + 4, minor))
    here = driver_cuda()
    if here is not None and here < needed:
        wanted = f"needs a driver for CUDA {needed[0]}.{needed[1]}, this one serves {here[0]}.{here[1]}"
        raise MissingError(str(path), f"PTX {isa} {wanted}", "Update the driver.")
