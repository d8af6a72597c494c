"""The two builders, as data: which package, which module compiles, how it is installed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from hqc.errors import ExportError, RuntimeMissingError

__all__ = ["BUILDERS", "RTX", "TRT", "Builder", "find_builder", "package_version", "release"]


@dataclass(frozen=True)
class Builder:
    """A package that compiles ONNX for GPUs.

    packages: distributions that bring `module`, the usual one first.
    worker: the module that a build runs in, a process of its own.
    oldest: the first release whose network and parser suit what hqc writes.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    module: str
    worker: str
    oldest: str
    install: str

    def installed(self) -> str:
        """The version that is installed.

        Raises:
            RuntimeMissingError: if there is none, it cannot be imported as a module, or it is too old.
        """
        found = self.version()
        if found is None or find_spec(self.module) is None:
            raise RuntimeMissingError(f"builder {self.name}", f"{self.packages[0]} is not installed", self.install)
        if release(found) < release(self.oldest):
            raise RuntimeMissingError(
                f"builder {self.name}", f"{self.packages[0]} {found} is older than {self.oldest}", self.install
            )
        return found

    def version(self) -> str | None:
        """The version whose distribution is installed, if one is."""
        return next(filter(None, map(package_version, self.packages)), None)


RTX = Builder(
    name="rtx",
    title="TensorRT-RTX",
    packages=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    module="tensorrt_rtx",
    worker="hqc.engines.rtx_worker",
    oldest="1.7",
    install="Run `pip install 'hqc[rtx]'` (Linux or Windows; there is no wheel for macOS).",
)

TRT = Builder(
    name="trt",
    title="TensorRT",
    packages=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    module="tensorrt",
    worker="hqc.engines.trt_worker",
    oldest="10.8",
    install="Run `pip install tensorrt --extra-index-url https://pypi.nvidia.com` on the machine with the GPU.",
)

BUILDERS: Mapping[str, Builder] = {builder.name: builder for builder in (RTX, TRT)}


def find_builder(name: str) -> Builder:
    """A builder by its name.

    Raises:
        ExportError: if there is none of that name.
    """
    if name not in BUILDERS:
        raise ExportError(f"builder {name!r}", "is not known", f"Give {' or '.join(BUILDERS)}.")
    return BUILDERS[name]


def package_version(package: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The numbers that lead a version.

    >>> release("2.13.0+cpu"), release("3.9.0.post1"), release("11.4rc1")
    ((2, 13, 0), (3, 9, 0), (11, 4))
    """
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()
