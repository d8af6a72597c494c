"""What makes a folder an artefact: manifest.json, with its kind and version, and size and sha256 of every file.

Importing this loads nothing heavy: what serves an export without torch checks it too.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hqc.claims import restore_interrupted
from hqc.errors import ArtefactError
from hqc.wording import first_words

__all__ = [
    "FORMAT_VERSION",
    "PIPELINE_KIND",
    "check_manifest",
    "kind_of",
    "read_json",
    "refuse_links",
    "write_manifest",
]

FORMAT_VERSION = 1
_LARGEST_JSON = 256 * 2**20

PIPELINE_KIND = "hqc-pipeline"
"""An exported pipeline, which runs without torch (`hqc.lite`)."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, kind: str, fields: Mapping[str, Any]) -> None:
    """Writes manifest.json over every other file in the folder: kind, version, sha256 and size of each."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": kind, "version": FORMAT_VERSION, **fields, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_json(path: Path) -> Any:
    """A file that hqc wrote.

    Raises:
        ArtefactError: if it is larger than any, or no JSON.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ArtefactError(str(path), "is larger than any that hqc writes", "Write the artefact again.")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(str(path), f"cannot be read ({error})", "Write the artefact again.") from error


def kind_of(folder: Path) -> str | None:
    """The kind of artefact that a folder says it is; None where it is none."""
    restore_interrupted(folder)
    try:
        with (folder / "manifest.json").open(encoding="utf-8") as file:
            manifest = json.loads(file.read(_LARGEST_JSON))
    except (OSError, ValueError, RecursionError):
        return None
    kind = manifest.get("format") if isinstance(manifest, dict) else None
    return kind if isinstance(kind, str) else None


def check_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Reads manifest.json and checks every file that it names by size and hash.

    Raises:
        ArtefactError: if the folder is missing, of another kind or version, damaged, or names files outside itself.
    """
    restore_interrupted(folder)
    if not folder.is_dir():
        raise ArtefactError(str(folder), "no such folder", "Check the path, or make one with `hqc trace`.")
    if "manifest.json" not in _names(folder):
        raise ArtefactError(str(folder), "has no manifest.json", "Give a folder that hqc wrote.")
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtefactError(
            str(folder), f"holds {_short(found)}; expected {kind!r}", "Give the other kind of artefact."
        )
    if manifest.get("version") != FORMAT_VERSION:
        raise ArtefactError(
            str(folder),
            f"has format version {_short(manifest.get('version'))}; this hqc reads {FORMAT_VERSION}",
            "Write it again with this version of hqc.",
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ArtefactError(str(folder / "manifest.json"), "lists no files", "Write the artefact again.")
    for name, expected in files.items():
        try:
            _check_file(folder, name, expected)
        except (OSError, ValueError) as error:
            found = f"cannot read {_short(name)} ({first_words(error, 80)})"
            raise ArtefactError(str(folder), found, "Do not use this artefact.") from error
    refuse_links(folder / "pipeline")
    return manifest


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
        raise ArtefactError(str(folder), found, "Check its permissions.") from error


def refuse_links(folder: Path) -> None:
    """Refuses anything but files and folders: whoever copies or reads a link reads what lies elsewhere.

    Raises:
        ArtefactError: naming the link.
    """
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
            raise ArtefactError(str(path), "is a link, or no plain file", "Do not use this artefact.")


def _short(value: Any) -> str:
    """A value from a file in part of a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _check_file(folder: Path, name: str, expected: Any) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(expected, dict):
        raise ArtefactError(str(folder), f"names {_short(name)}, outside itself", "Do not use this artefact.")
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise ArtefactError(str(path), "is a link", "Do not use this artefact.")
    if not path.is_file():
        raise ArtefactError(str(path), "is missing", "Copy the whole folder, or write it again.")
    if path.stat().st_size != expected.get("size"):
        raise ArtefactError(
            str(path),
            f"is truncated or changed: {path.stat().st_size} bytes, the manifest says {_short(expected.get('size'))}",
            "Copy the whole folder again.",
        )
    if _sha256(path) != expected.get("sha256"):
        raise ArtefactError(str(path), "is damaged: its sha256 is not the manifest's", "Copy the folder again.")
