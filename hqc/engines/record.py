"""build.json: what engines lie in an export folder, what they were built from and with; and loading a plan.

build.json      {"format", "version", "hqc", "onnx": {…}, "engines": {"rtx_sm80": {…}, …}}
engine_*.plan   one file an engine, listed there with size and sha256

The manifest of the folder does not list these files: they come later, and not everyone who checks it loads them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hqc import __version__
from hqc.engines.key import onnx_digest
from hqc.errors import ArtefactError
from hqc.paths import StrPath

__all__ = [
    "BUILD_FILE",
    "EngineRecord",
    "LoadedPlan",
    "build_text",
    "engine_name",
    "file_sha256",
    "load_plan",
    "read_records",
]

BUILD_FILE = "build.json"
BUILD_KIND = "hqc-engines"
BUILD_VERSION = 1


@dataclass(frozen=True)
class EngineRecord:
    """One engine of a folder.

    onnx: digest of the model and its data; key: `engine_key` of all that the engine depends on.
    shapes: input -> smallest, usual and largest shape; dtypes: inputs and outputs -> type.
    """

    file: str
    builder: str
    builder_version: str
    arch: str
    onnx: str
    key: str
    options: Mapping[str, Any]
    shapes: Mapping[str, Any]
    dtypes: Mapping[str, str]
    sha256: str
    size_bytes: int
    seconds: float
    peak_resident_bytes: int

    @property
    def name(self) -> str:
        """As in build.json and report.json."""
        return engine_name(self.builder, self.arch)


@dataclass(frozen=True)
class LoadedPlan:
    """A plan whose hash has been checked."""

    record: EngineRecord
    data: bytes


def engine_name(builder: str, arch: str) -> str:
    """`rtx_sm80` for builder `rtx` and architecture `sm_80`."""
    return f"{builder}_{arch.replace('_', '')}"


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_text(records: Mapping[str, EngineRecord], onnx: Mapping[str, Any]) -> str:
    """The text of build.json."""
    data = {
        "format": BUILD_KIND,
        "version": BUILD_VERSION,
        "hqc": __version__,
        "onnx": dict(onnx),
        "engines": {name: asdict(record) for name, record in sorted(records.items())},
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def read_records(folder: Path) -> dict[str, EngineRecord]:
    """The engines that build.json lists; none if there is no such file.

    Raises:
        ArtefactError: if it cannot be read, or is of another version of hqc.
    """
    path = folder / BUILD_FILE
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != BUILD_KIND or data.get("version") != BUILD_VERSION:
            raise ArtefactError(
                str(path),
                f"holds {data.get('format')!r} version {data.get('version')!r}; this hqc reads {BUILD_VERSION}",
                "Remove it and build the engines again.",
            )
        records = {name: EngineRecord(**entry) for name, entry in data["engines"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtefactError(str(path), f"cannot be read ({error})", "Remove it and build the engines again.") from error
    for name, record in records.items():
        if record.file != Path(record.file).name or record.name != name:
            raise ArtefactError(str(path), f"names {record.file!r} as {name!r}", "Do not use this artefact.")
    return records


def load_plan(folder: StrPath, arch: str, *, builder: str = "rtx") -> LoadedPlan:
    """Reads an engine's plan and checks it: present, built from this folder's model, undamaged.

    Raises:
        ArtefactError: if it is not.
    """
    folder = Path(folder)
    records, name = read_records(folder), engine_name(builder, arch)
    command = (
        f"Run `hqc build-engine {folder} --engine {builder}{f' --arch {arch}' if builder == 'rtx' else ''} --force`."
    )
    if name not in records:
        found = f"engines {', '.join(sorted(records))}, none" if records else "no engine"
        raise ArtefactError(str(folder), f"holds {found} for {arch} by {builder}", command.replace(" --force", ""))
    record, path = records[name], folder / records[name].file
    if record.onnx != folder_digest(folder):
        raise ArtefactError(str(path), "was built from another model than the folder's model.onnx", command)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtefactError(str(path), f"cannot be read ({error.strerror})", command) from error
    if len(data) != record.size_bytes:
        found = f"is truncated or changed: {len(data)} bytes, {BUILD_FILE} says {record.size_bytes}"
        raise ArtefactError(str(path), found, command)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise ArtefactError(str(path), f"is damaged: its sha256 is not that of {BUILD_FILE}", command)
    return LoadedPlan(record, data)


def folder_digest(folder: Path) -> str:
    """Digest of the model and its external data by what the folder's manifest says of them; nothing is hashed again.

    Raises:
        ArtefactError: if there is no readable manifest.
    """
    path = folder / "manifest.json"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        names = [name for name in files if name.startswith("model.onnx")]
        return onnx_digest(files, *(names or ["model.onnx"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(str(path), f"cannot be read ({error})", "Give a folder that hqc wrote.") from error
