"""Contenders of `hqc bench` in this process, where a test is about something else than their own ones."""

from pathlib import Path
from typing import Any

import pytest

from hqc.errors import EvaluationError
from hqc.evaluation.bench.contender import Contender, Loaded
from hqc.evaluation.bench.worker import Worker

__all__ = ["run_here"]


class _Here(Contender):
    """Asks a worker as the process would be asked: what it raises is an answer."""

    def __init__(self, name: str, runtime: str, model: Path, **_: Any) -> None:
        self.name, self.runtime, self.model = name, runtime, model
        self._worker = Worker()

    def close(self) -> None:
        self._worker = Worker()

    def load(self, inputs: Path, threads: int) -> Loaded:
        return super().load(inputs, 1)  # as every test: the number is the process's

    def _ask(self, what: str, **fields: Any) -> dict[str, Any]:
        try:
            return self._worker.answer({"do": what, **fields})
        except Exception as error:
            raise EvaluationError(self.name, f"{type(error).__name__}: {error}", "–") from error


def run_here(patch: pytest.MonkeyPatch, module: str = "hqc.evaluation.bench.run") -> None:
    """In the module that starts them; a process takes seconds to import its runtime."""
    patch.setattr(f"{module}.Contender", _Here)
