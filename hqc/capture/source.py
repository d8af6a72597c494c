"""`Source`: a denoiser that is ready for capture."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import nn

from hqc.program import InputSpec, Origin

__all__ = ["Source", "versions"]


@dataclass(frozen=True)
class Source:
    """A denoiser ready for capture: module(*inputs), its inputs, its origin, the pipeline folder around it.

    prefix: what a wrapper put in front of the names that users know; capture takes it off. notes: what `hqc trace`
    says about the source besides.
    """

    module: nn.Module
    inputs: tuple[InputSpec, ...]
    origin: Origin
    pipeline: Path | None = None
    prefix: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """The versions of the packages that a capture depends on."""
    found = {}
    for package in ("hqc", "torch", "diffusers", "onnx", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
