"""The parent's side of a build: starts the builder's process, and says in one line what became of it."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from hqc.engines.builders import Builder
from hqc.engines.requests import Answer, BuildRequest
from hqc.errors import ExportError

__all__ = ["run_builder"]

_LOG_END = 2**16


def run_builder(builder: Builder, request: BuildRequest, *, where: str) -> Answer:
    """Builds one engine in a process of its own; the plan lies at `request.plan` afterwards.

    where: the export, for messages.

    Raises:
        ExportError: if the builder refuses the model, fails, or takes its process down.
    """
    what = f"{where} for {request.arch}"
    with tempfile.TemporaryDirectory(prefix="hqc-build-") as folder:
        asked, answered, said = (Path(folder) / name for name in ("request.json", "answer.json", "said.txt"))
        request.write(asked)
        with said.open("wb") as file:
            code = subprocess.run(
                [sys.executable, "-m", builder.worker, str(asked), str(answered)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                check=False,
            ).returncode
        if code != 0 or not answered.exists():
            last = _last_line(Path(request.log)) or _last_line(said) or "nothing was said"
            raise ExportError(what, f"{builder.title} {_ending(code)}; last it said: {last}", _advice(code))
        answer = Answer.read(answered)
    if answer.problem:
        node = f" node {answer.node}" if answer.node else ""
        raise ExportError(
            what, f"{builder.title} {answer.builder_version} refuses{node} ({answer.step}): {answer.problem}", _ADVICE
        )
    return answer


_ADVICE = "docs/tensorrt.md says what the builder takes."


def _ending(code: int) -> str:
    """How a process ended that left no answer."""
    if code >= 0:
        return f"ended with status {code} and no engine"
    try:
        return f"crashed ({signal.Signals(-code).name})"
    except ValueError:
        return f"crashed (signal {-code})"


def _advice(code: int) -> str:
    if -code == getattr(signal, "SIGKILL", None):
        return "Most often memory ran out: build fewer things at a time, or take a larger machine."
    return _ADVICE


def _last_line(path: Path) -> str:
    """The last line of a log that may be long, or may not be there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_END))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line for line in text.split("\n") if line.strip()]
    return " ".join(lines[-1].split())[:300] if lines else ""
