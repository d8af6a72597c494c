"""What is asked of a builder process and what it answers: JSON files, so that a crash leaves what was said before it.

Imported by the process itself: the standard library only.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Answer", "BuildRequest"]


@dataclass(frozen=True)
class BuildRequest:
    """One engine for one architecture.

    shapes: input -> smallest, usual, largest shape, for inputs whose batch is free.
    log: where every line of the builder goes as it is said.
    timing_cache: kernel timings, read and written; None for none.
    plugins: register hqc's plugins first.
    """

    onnx: str
    plan: str
    log: str
    arch: str
    shapes: Mapping[str, tuple[tuple[int, ...], ...]]
    workspace_bytes: int | None = None
    tf32: bool = True
    timing_cache: str | None = None
    plugins: bool = False

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "BuildRequest":
        """What `write` wrote."""
        return BuildRequest(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Answer:
    """What came of a build.

    problem: empty if the plan was written; else what the builder said, at ONNX node `node` if it named one.
    layers: the engine's layers as the builder's text.
    dtypes: input and output names with their types.
    """

    problem: str = ""
    step: str = ""
    node: str = ""
    layers: str = ""
    builder_version: str = ""
    seconds: float = 0.0
    peak_resident_bytes: int = 0
    dtypes: Mapping[str, str] | None = None

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "Answer":
        """What `write` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Answer(**data)
