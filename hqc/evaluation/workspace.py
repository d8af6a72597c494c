"""Where long work keeps what it makes: one artefact a stage, made again only when what it depends on changed.

WORK/float.hqc, quantised.hqc, integer, onnxruntime-fp32, …     artefacts with manifests
WORK/stages.json                                                stage -> fingerprint of what it was made from
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hqc
from hqc.atomic import write_file
from hqc.errors import ArtefactError
from hqc.storage import check_manifest, refuse_existing

__all__ = ["Stage", "Workspace", "content", "fingerprint"]

_STAGES = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One step of the preparation: its name, its seconds, and whether an earlier run's result was taken."""

    name: str
    seconds: float
    reused: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


class Workspace:
    """Runs stages in a folder and lists them in `done`; `on_start` and `on_end` hear of each."""

    def __init__(
        self,
        folder: Path,
        *,
        force: bool = False,
        on_start: Callable[[str], None] = lambda name: None,
        on_end: Callable[[Stage], None] = lambda stage: None,
    ) -> None:
        self.folder, self.done = folder, list[Stage]()
        self._force, self._on_start, self._on_end = force, on_start, on_end
        self._made: dict[str, Path] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactError(
                str(folder), f"cannot be written ({error.strerror})", "Choose another --work-dir."
            ) from error

    def make(
        self,
        name: str,
        kind: str,
        depends: Mapping[str, Any] | None,
        build: Callable[[Path], None],
        *,
        measures: bool = False,
    ) -> Path:
        """The artefact `name`: an earlier run's where it depended on the same, else what `build(path)` writes.

        kind: the manifest's format. depends: JSON data that decides the result; None: nothing is known, build always.
        measures: the code of `hqc.evaluation` decides it too.

        Raises:
            ArtefactError: if something else stands in its place.
        """
        if name in self._made:
            return self._made[name]
        target, keys = self.folder / name, self._keys()
        key = None if depends is None else fingerprint(name, depends, measures=measures)
        reused = key is not None and keys.get(name) == key and _intact(target, kind)
        with self.stage(name, reused=reused):
            if not reused:
                self._build(name, key, build)
        self._made[name] = target
        return target

    def _build(self, name: str, key: str | None, build: Callable[[Path], None]) -> None:
        target, keys = self.folder / name, self._keys()
        refuse_existing(target, force=self._force or name in keys)
        for left in self.folder.glob(f".{name}.*") if name in keys else ():
            shutil.rmtree(left, ignore_errors=True)  # of a run that was killed while writing
        self._write({**keys, name: ""})  # killed from here on, the next run makes it again
        build(target)
        self._write({**keys, name: key or ""})

    @contextmanager
    def stage(self, name: str, *, reused: bool = False) -> Iterator[None]:
        """Times the block and lists it as a stage if it ends well."""
        self._on_start(name)
        start = time.perf_counter()
        yield
        stage = Stage(name, round(time.perf_counter() - start, 3), reused)
        self.done.append(stage)
        self._on_end(stage)

    def _keys(self) -> dict[str, str]:
        """What earlier runs left; a file that cannot be read counts as none."""
        try:
            data = json.loads((self.folder / _STAGES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(k): str(v) for k, v in data.items()} if isinstance(data, dict) else {}

    def _write(self, keys: Mapping[str, str]) -> None:
        write_file(self.folder / _STAGES, (json.dumps(keys, indent=1) + "\n").encode())


def content(artefact: Path) -> dict[str, str]:
    """What an artefact holds: the hashes of its graph, weights and plan from its manifest (the history has times)."""
    files = json.loads((artefact / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "history.json" and "/" not in name}


def _intact(folder: Path, kind: str) -> bool:
    try:
        check_manifest(folder, kind)
    except ArtefactError:
        return False
    return True


def fingerprint(name: str, depends: Mapping[str, Any], *, measures: bool = False) -> str:
    """What a stage was made from in one word: see `Workspace.make`."""
    return _digest({"stage": name, "code": _code_digest(measures), **depends})


@cache
def _code_digest(measures: bool) -> str:
    """hqc's own source: another compiler makes another artefact. measures: with what only measures."""
    root, digest = Path(hqc.__file__).parent, hashlib.sha256()
    left_out = ("commands", "serving") if measures else ("commands", "evaluation", "serving")
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in left_out:
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
