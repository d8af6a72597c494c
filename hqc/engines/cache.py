"""Engines that were built before, by key; and kernel timings, kept apart from them.

    ROOT/KEY/engine.plan, answer.json      one engine: plan, and what its build said (layers, seconds, …)
    ROOT/timing_sm90_10.16.1.cache         kernel timings of one card and one version of TensorRT

An entry is written whole or not at all, and never changed: its key says what it was made from.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from hqc.atomic import staged_folder
from hqc.engines.record import file_sha256
from hqc.engines.requests import Answer
from hqc.errors import ArtefactError

__all__ = ["check_cache", "default_cache", "find_engine", "keep_engine", "timing_cache"]

_PLAN, _ANSWER = "engine.plan", "answer.json"


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/hqc/engines`, or `~/.cache/hqc/engines`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "hqc" / "engines"


def check_cache(root: Path) -> None:
    """Refuses a cache that cannot be written, before long work starts.

    Raises:
        ArtefactError: if it cannot.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=root):
            pass
    except OSError as error:
        raise ArtefactError(
            f"engine cache {root}", f"cannot be written ({error.strerror})", "Give a writable folder with --cache."
        ) from error


def timing_cache(root: Path, arch: str, builder_version: str, plugins: str = "") -> Path:
    """Where the timings of a card and a version are kept.

    plugins: `plugins_digest`. TensorRT tells plugin kernels apart by the plugin's name alone, so that other PTX under
    it would be taken for timed already.
    """
    ending = f"_{plugins[:16]}" if plugins else ""
    return root / f"timing_{arch.replace('_', '')}_{builder_version}{ending}.cache"


def find_engine(root: Path, key: str) -> tuple[Path, Answer] | None:
    """The plan of this key, after checking its hash, and what its build said.

    Raises:
        ArtefactError: if the entry is damaged.
    """
    entry = root / key
    if not entry.exists():
        return None
    try:
        stored = json.loads((entry / _ANSWER).read_text(encoding="utf-8"))
        answer, sha256 = Answer(**stored["answer"]), stored["sha256"]
        intact = file_sha256(entry / _PLAN) == sha256
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(str(entry), f"cannot be read ({error})", "Remove it, or build with --force.") from error
    if not intact:
        raise ArtefactError(str(entry / _PLAN), "is damaged", "Remove its folder, or build with --force.")
    return entry / _PLAN, answer


def keep_engine(root: Path, key: str, plan: Path, answer: Answer) -> None:
    """Puts an engine into the cache, in the place of one of the same key.

    Raises:
        ArtefactError: if it cannot be written.
    """
    try:
        with staged_folder(root / key) as new:
            shutil.copyfile(plan, new / _PLAN)
            stored = {"sha256": file_sha256(new / _PLAN), "answer": asdict(answer)}
            (new / _ANSWER).write_text(json.dumps(stored) + "\n", encoding="utf-8")
    except OSError as error:
        raise ArtefactError(
            f"engine cache {root}", f"cannot be written ({error.strerror})", "Give a writable folder with --cache."
        ) from error
