"""The parent's end of a worker process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from hqc.errors import EvaluationError

__all__ = ["Contender", "Loaded", "Memory", "Runner", "worker_environment"]


class Runner(Protocol):
    """What takes turns: one call, its milliseconds."""

    def run(self) -> float:
        """One call on the fixed inputs.

        Raises:
            EvaluationError: if it fails.
        """
        ...


@dataclass(frozen=True)
class Loaded:
    """What loading took: seconds, and the process's resident bytes before (imports only) and after.

    notes: what the runtime says of how it runs the model.
    """

    load_seconds: float
    runtime_resident_bytes: int
    loaded_resident_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Memory:
    """Resident bytes now and at their peak; bytes that torch allocated on a GPU at their peak, 0 without one."""

    resident_bytes: int
    peak_resident_bytes: int
    device_bytes: int = 0


class Contender:
    """A model in a process of its own, with its own memory and thread pool. A context manager: leaving it ends it."""

    def __init__(self, name: str, runtime: str, model: Path, *, environment: Mapping[str, str] | None = None) -> None:
        """environment: of the process, instead of this one's."""
        self.name, self.runtime, self.model = name, runtime, model
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hqc.evaluation.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            env=worker_environment(environment),
        )

    def __enter__(self) -> "Contender":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; a second call does nothing."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with suppress(BrokenPipeError):  # it ended by itself
                    pipe.close()
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def kill(self) -> None:
        """Ends the process at once, from any thread: a request that another thread waits for fails."""
        self._process.kill()

    def load(self, inputs: Path, threads: int) -> Loaded:
        """Loads the model with inputs from an .npz file.

        Raises:
            EvaluationError: if the runtime refuses it.
        """
        request = {"runtime": self.runtime, "model": str(self.model), "inputs": str(inputs), "threads": threads}
        answer = self._ask("load", **request)
        return Loaded(**{**answer, "notes": tuple(answer["notes"])})

    def prepare(self) -> float:
        """What is done once before anything is timed: compiling and capturing; its seconds.

        Raises:
            EvaluationError: if it fails.
        """
        return float(self._ask("prepare")["seconds"])

    def run(self) -> float:
        """See `Runner`."""
        return float(self._ask("run")["milliseconds"])

    def save_output(self, file: Path) -> None:
        """Runs once more and writes the output as .npy."""
        self._ask("output", file=str(file))

    def memory(self) -> Memory:
        """What the process holds now, and held at most."""
        return Memory(**self._ask("memory"))

    def _ask(self, what: str, **fields: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"do": what, **fields}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise EvaluationError(self.name, self._death(), "See `hqc bench --help` for smaller settings.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EvaluationError(
                self.name, str(answer["error"]), "Leave it out of --against, or give smaller settings."
            )
        return answer

    def _death(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        lines = [line for line in self._said.read().decode("utf-8", "replace").splitlines() if line.strip()]
        if code < 0:
            return f"its process was killed by signal {-code}{' (out of memory?)' if code == -9 else ''}"
        return f"its process ended with status {code}: {lines[-1] if lines else 'no message'}"


def worker_environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, or a given one, in which a child finds the same packages."""
    paths = [path for path in sys.path if path]
    return {**(os.environ if given is None else given), "PYTHONPATH": os.pathsep.join(paths)}
