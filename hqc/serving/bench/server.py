"""The server that is measured: a process of its own on a free port of the loopback interface."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from hqc.errors import EvaluationError, HqcError
from hqc.serving.engine import Policy

if TYPE_CHECKING:
    from hqc.runtimes import Runtime
    from hqc.serving.app import Served

__all__ = ["Source", "serving"]

START_S = 600.0
STOP_S = 30.0


@dataclass(frozen=True)
class Source:
    """What is served: an artefact with its pipeline, or an export whose program tells how its latents are drawn.

    threads, lanes: as of `hqc serve`.
    """

    model: str
    runtime: "Runtime | None" = None
    program: Path | None = None
    threads: int | None = None
    lanes: int = 1

    def opened(self) -> "Served":
        """Loaded."""
        if self.program is None:
            from hqc.serving.opening import opened

            return opened(self.model, self.runtime, threads=self.threads, lanes=self.lanes)
        from hqc.runtimes import load
        from hqc.sampling.sources import synthetic_task
        from hqc.serving.app import Served
        from hqc.serving.latents import LatentBackend
        from hqc.storage import load_program

        loaded = load(self.model, runtime=self.runtime, threads=self.threads)
        backend = LatentBackend(loaded.session, synthetic_task(load_program(self.program)))
        return Served(backend, loaded.name, loaded.runtime, self.lanes)


@contextmanager
def serving(source: Source, policy: Policy, max_batch: int) -> Iterator[int]:
    """The port of a server of `source` while inside.

    Raises:
        EvaluationError: if it does not start.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(source, policy, max_batch, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _port(ours)
    finally:
        process.terminate()
        process.join(STOP_S)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()


def _port(announced: Connection) -> int:
    try:
        found = announced.recv() if announced.poll(START_S) else "did not start in time"
    except EOFError:
        found = "ended at its start"
    if isinstance(found, int):
        return found
    raise EvaluationError("bench-serve's server", str(found), "Serve the model with hqc serve to see more.")


def _serve(source: Source, policy: Policy, max_batch: int, announce: Connection) -> None:
    from hqc.serving.app import create_app
    from hqc.serving.limits import Limits
    from hqc.serving.server import serve

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        os.setsid()  # Ctrl-C is for the one who measures
        served = source.opened()
    except HqcError as error:
        announce.send(str(error))
        return
    limits = Limits(max_batch=max_batch, max_queue=10_000, max_connections=10_000, request_s=86_400, shutdown_s=0)
    app = create_app([served], limits=limits, policy=policy)
    serve(app, port=0, limits=limits, announce=lambda url: announce.send(int(url.rpartition(":")[2])))


def _end_with_parent() -> None:
    """A measurement that was killed leaves no server behind."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
