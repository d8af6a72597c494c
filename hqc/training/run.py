"""The work folder of a training run: what it needs to go on after it was killed, and its log.

WORK/quantised.hqc    the calibrated program that training started from; gone once the result is saved
WORK/checkpoint       the last checkpoint; gone once the result is saved
WORK/log.jsonl        one line an update
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from hqc.atomic import is_artefact, write_file
from hqc.claims import clear_away, remove_tree
from hqc.errors import ArtefactError
from hqc.program import Program
from hqc.recipes import Recipe
from hqc.sampling.task import Task
from hqc.storage import load_program, save_program
from hqc.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hqc.training.distillation import StepRecord

__all__ = ["Run", "run_settings"]


def run_settings(program: Program, recipe: Recipe, bits: str, keep_float: Sequence[str], task: Task) -> dict[str, Any]:
    """Everything that decides a run's result, as JSON data; checkpoints go more often without changing it."""
    digest = hashlib.sha256()
    for name in sorted(program.state):
        digest.update(name.encode())
        digest.update(program.state[name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    settings = recipe.model_dump(mode="json")
    settings["training"].pop("checkpoint_every")
    return {
        "recipe": settings,
        "bits": bits.lower(),
        "keep_float": list(keep_float),
        "weights_sha256": digest.hexdigest(),
        "threads": torch.get_num_threads(),
        "conditions": task.drawn_from,
    }


class Run:
    """The work folder of one training run. Whoever writes into it has claimed it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quantised, self.checkpoint, self.log_path = (
            folder / "quantised.hqc",
            folder / "checkpoint",
            folder / "log.jsonl",
        )

    @property
    def unfinished(self) -> bool:
        """Whether there is something to resume."""
        return os.path.lexists(self.quantised) or os.path.lexists(self.checkpoint)

    def check_new(self, *, restart: bool) -> None:
        """Refuses to start anew over what is not hqc's, or without `restart` over an unfinished run.

        Raises:
            ArtefactError: naming what is there.
        """
        for path in (self.quantised, self.checkpoint):
            if os.path.lexists(path) and not is_artefact(path):
                raise ArtefactError(str(path), "exists and was not written by hqc", "Choose another --work-dir.")
        if not self._has_own_log():
            raise ArtefactError(str(self.log_path), "exists and was not written by hqc", "Choose another --work-dir.")
        if self.unfinished and not restart:
            raise ArtefactError(
                str(self.folder),
                f"holds an unfinished run ({self._state()})",
                "Give --resume to continue it, or --restart to drop it and begin anew.",
            )

    def _has_own_log(self) -> bool:
        """Whether the log is one, or there is none."""
        if not os.path.lexists(self.log_path):
            return True
        try:
            with self.log_path.open(encoding="utf-8") as file:
                first = file.readline(1000)
            return not first or json.loads(first).keys() == {field.name for field in fields(StepRecord)}
        except (OSError, ValueError, AttributeError, RecursionError):
            return False

    def _state(self) -> str:
        try:
            step = int(json.loads((self.checkpoint / "manifest.json").read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, LookupError, TypeError):
            return "no checkpoint yet"
        return f"a checkpoint after update {step}"

    def begin(self, student: Program) -> None:
        """Starts anew from a calibrated program; what was there is dropped."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactError(
                str(self.folder), f"cannot be written ({error.strerror})", "Choose another --work-dir."
            ) from error
        remove_tree(self.checkpoint)
        write_file(self.log_path, b"")
        save_program(student, self.quantised, force=True)

    def load(self, settings: dict[str, Any]) -> tuple[Program, Checkpoint | None]:
        """The calibrated program and the last checkpoint; the log is cut to that.

        Raises:
            ArtefactError: if there is no run, or it is one with other settings.
        """
        if not self.quantised.exists():
            raise ArtefactError(str(self.folder), "holds no run to resume", "Start it without --resume.")
        student = load_program(self.quantised)
        saved = dict(student.plan.training)
        if saved != settings:
            raise ArtefactError(
                str(self.folder),
                f"belongs to a run with other settings ({_difference(saved, settings)})",
                "Resume with the same program and options, or give --restart instead to begin anew.",
                lists=True,
            )
        checkpoint = load_checkpoint(self.checkpoint) if self.checkpoint.exists() else None
        self._cut_log(checkpoint.step if checkpoint else 0)
        return student, checkpoint

    def _cut_log(self, steps: int) -> None:
        write_file(self.log_path, "".join(f"{line}\n" for line in self._log_lines()[:steps]).encode())

    def _log_lines(self) -> list[str]:
        return self.log_path.read_text(encoding="utf-8").splitlines() if self.log_path.exists() else []

    def log(self, step: StepRecord) -> None:
        """Adds a line to the log."""
        try:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(step)) + "\n")
        except OSError as error:
            raise ArtefactError(
                str(self.log_path), f"cannot be written ({error.strerror})", "Free some space, then give --resume."
            ) from error

    def last_loss(self) -> float | None:
        """The loss that the log ends with."""
        try:
            return float(json.loads(self._log_lines()[-1])["loss"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Replaces the checkpoint."""
        save_checkpoint(checkpoint, self.checkpoint)

    def finish(self) -> None:
        """Drops what is needed to resume only: the result is saved. The log stays."""
        for path in (self.checkpoint, self.quantised):
            if is_artefact(path):
                remove_tree(path)
            clear_away(path)  # what a killed process was writing


def _difference(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for key in sorted(saved.keys() | wanted.keys()):
        ours, theirs = saved.get(key), wanted.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            if ours != theirs:
                parts.append(_difference(ours, theirs, f"{prefix}{key}."))
        elif ours != theirs:
            parts.append(f"{prefix}{key} was {ours!r}, now {theirs!r}")
    return "; ".join(parts)
