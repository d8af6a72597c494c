"""The work folder of a run: what it needs to go on after it was killed, and its log.

WORK/run.json         what decides the result: steps, options, bits, weights
WORK/NN-step.hqc      the program after step NN, the last that took long; gone once the result is saved
WORK/checkpoint       where the step after it stands; gone once the result is saved
WORK/log.jsonl        one line an update
WORK/validation.jsonl one line a measurement on the held-out trajectory, where a step makes some
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from hqc.atomic import is_artefact, write_file
from hqc.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hqc.claims import clear_away, remove_tree
from hqc.errors import ArtefactError
from hqc.program import Program
from hqc.sampling import Update, Validation
from hqc.storage import load_program, save_program

__all__ = ["Run"]

_FORMAT = "hqc-run"
_OLD = "quantised.hqc"  # of versions that knew one step only
_PROGRAM = re.compile(r"(\d\d)-[a-z_]+\.hqc")


class Run:
    """The work folder of one run of a recipe. Whoever writes into it has claimed it.

    writes: False for one of several processes that train together, of which the first writes: nothing is changed.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder, self._writes = folder, writes
        self.settings_path = folder / "run.json"
        self.checkpoint = folder / "checkpoint"
        self.log_path = folder / "log.jsonl"
        self.validation_path = folder / "validation.jsonl"
        self._step = 1  # that runs now
        self._new: Mapping[str, Any] | None = None  # the settings of a run that has written nothing yet

    def owns(self, path: Path) -> bool:
        """Whether a path is one of those that a run writes."""
        own = (self.folder, self.settings_path, self.checkpoint, self.log_path, self.folder / _OLD)
        resolved = path.resolve()
        inside = resolved.parent == self.folder.resolve() and _PROGRAM.fullmatch(resolved.name) is not None
        return inside or resolved in [one.resolve() for one in own]

    def _programs(self) -> list[Path]:
        """The programs that are there, by the number of their step; an older version's first."""
        old = [self.folder / _OLD] if os.path.lexists(self.folder / _OLD) else []
        if not self.folder.is_dir():
            return old
        return [*old, *sorted(path for path in self.folder.iterdir() if _PROGRAM.fullmatch(path.name))]

    @property
    def unfinished(self) -> bool:
        """Whether there is something to resume."""
        return os.path.lexists(self.settings_path) or os.path.lexists(self.checkpoint) or bool(self._programs())

    def check_new(self, *, restart: bool) -> None:
        """Refuses to start anew over what is not hqc's, or without `restart` over an unfinished run.

        Raises:
            ArtefactError: naming what is there.
        """
        foreign = [path for path in (*self._programs(), self.checkpoint) if _is_foreign(path)]
        foreign += [] if self._settings_are_own() else [self.settings_path]
        foreign += [] if self._log_is_own() else [self.log_path]
        if foreign:
            raise ArtefactError(str(foreign[0]), "exists and was not written by hqc", "Choose another --work-dir.")
        if self.unfinished and not restart:
            raise ArtefactError(
                str(self.folder),
                f"holds an unfinished run ({self._state()})",
                "Give --resume to continue it, or --restart to drop it and begin anew.",
            )

    def _settings_are_own(self) -> bool:
        return not os.path.lexists(self.settings_path) or self._settings() is not None

    def _settings(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.settings_path.read_text(encoding="utf-8"))
            return dict(found["settings"]) if found["format"] == _FORMAT else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def _log_is_own(self) -> bool:
        """Whether the log is one, or there is none."""
        if not os.path.lexists(self.log_path):
            return True
        try:
            with self.log_path.open(encoding="utf-8") as file:
                first = file.readline(1000)
            keys = {field.name for field in fields(Update)}
            return not first or keys <= json.loads(first).keys() <= {*keys, "of"}
        except (OSError, ValueError, AttributeError, RecursionError):
            return False

    def _state(self) -> str:
        try:
            step = int(json.loads((self.checkpoint / "manifest.json").read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, LookupError, TypeError):
            return "no checkpoint yet"
        return f"a checkpoint after update {step}"

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Starts anew. Nothing is written, and what was there stays, until there is something to keep."""
        self._new = settings

    def _write_first(self) -> None:
        if self._new is None or not self._writes:
            return
        settings, self._new = self._new, None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactError(
                str(self.folder), f"cannot be written ({error.strerror})", "Choose another --work-dir."
            ) from error
        for path in (self.checkpoint, *self._programs()):
            remove_tree(path)
        write_file(self.log_path, b"")
        self.validation_path.unlink(missing_ok=True)
        write_file(self.settings_path, json.dumps({"format": _FORMAT, "settings": settings}, indent=1).encode())

    def load(self, settings: Mapping[str, Any]) -> tuple[int, Program | None, Checkpoint | None]:
        """How many steps are done, the program after them, and where the next one stands; the log is cut to that.

        Raises:
            ArtefactError: if there is no run, or it is one with other settings.
        """
        saved = self._settings()
        if saved is None:
            if self._programs():
                raise ArtefactError(
                    str(self.folder), "belongs to a run of another version", "Give --restart to begin anew."
                )
            raise ArtefactError(str(self.folder), "holds no run to resume", "Start it without --resume.")
        if saved != json.loads(json.dumps(settings)):
            raise ArtefactError(
                str(self.folder),
                f"belongs to a run with other settings ({_difference(saved, json.loads(json.dumps(settings)))})",
                "Resume with the same program and options, or give --restart instead to begin anew.",
                lists=True,
            )
        programs = self._programs()
        done = int(programs[-1].name[:2]) if programs else 0
        program = load_program(programs[-1]) if programs else None
        checkpoint = load_checkpoint(self.checkpoint) if self.checkpoint.exists() else None
        if checkpoint is not None and checkpoint.of <= done:
            checkpoint = None  # of a step whose result was saved since
        self._step = checkpoint.of if checkpoint else done + 1
        if self._writes:
            self._cut_log(checkpoint.step if checkpoint else 0)
        return done, program, checkpoint

    def _cut_log(self, updates: int) -> None:
        """Keeps the lines of earlier steps, and the first so many of the one that goes on."""
        for path in (self.log_path, self.validation_path):
            if path.exists() or path == self.log_path:
                kept = [line for line in _lines(path) if _is_before(line, self._step, updates)]
                write_file(path, "".join(f"{line}\n" for line in kept).encode())

    def log(self, update: Update | Validation) -> None:
        """Adds a line to the log of updates, or to that of the validation."""
        if not self._writes:
            return
        self._write_first()
        path = self.log_path if isinstance(update, Update) else self.validation_path
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"of": self._step, **asdict(update)}) + "\n")
        except OSError as error:
            raise ArtefactError(
                str(path), f"cannot be written ({error.strerror})", "Free some space, then give --resume."
            ) from error

    def last_loss(self) -> float | None:
        """The loss that the log ends with."""
        try:
            return float(json.loads(_lines(self.log_path)[-1])["loss"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Replaces the checkpoint of the step that runs."""
        if not self._writes:
            return
        self._write_first()
        save_checkpoint(replace(checkpoint, of=self._step), self.checkpoint)

    def at(self, step: int) -> None:
        """The step that runs from now on, counted from 1."""
        self._step = step

    def keep(self, program: Program, name: str) -> None:
        """Keeps the program after the step that has run; what was needed to go on before it is dropped."""
        if not self._writes:
            return
        self._write_first()
        earlier = self._programs()
        save_program(program, self.folder / f"{self._step:02d}-{name}.hqc", force=True)
        for path in (self.checkpoint, *earlier):
            if path.name != f"{self._step:02d}-{name}.hqc":
                remove_tree(path)

    def finish(self) -> None:
        """Drops what is needed to resume only: the result is saved. The log stays."""
        for path in (self.checkpoint, *self._programs()):
            if is_artefact(path):
                remove_tree(path)
            clear_away(path)  # what a killed process was writing
        if self._settings() is not None:
            self.settings_path.unlink(missing_ok=True)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _is_foreign(path: Path) -> bool:
    return os.path.lexists(path) and not is_artefact(path)


def _is_before(line: str, step: int, updates: int) -> bool:
    try:
        found = json.loads(line)
        return (int(found["of"]), int(found["step"])) <= (step, updates)
    except (ValueError, LookupError, TypeError):
        return False  # half a line, of a process that was killed


def _difference(saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    return "; ".join(_differences(saved, wanted, prefix))


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted(saved.keys() | wanted.keys()):
        ours, theirs = saved.get(key), wanted.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differences(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            yield f"{prefix}{key} was {ours!r}, now {theirs!r}"
