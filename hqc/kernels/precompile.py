"""Kernels compiled by several processes into triton's cache on disk, where the launch of one finds them."""

import contextlib
import importlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hqc.machine import available_cores
from hqc.memory import available_bytes

__all__ = ["Compilers", "KernelJob", "answer", "compile_job", "compilers", "instead_of_launching"]

_BYTES = 1 << 30
"""Memory that a compiling process is given."""
_MOST = 32


@dataclass(frozen=True)
class KernelJob:
    """What triton would compile for a launch: plain data for another process."""

    module: str
    function: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    target: tuple[str, Any, int]

    def key(self) -> str:
        """Equal for equal kernels."""
        return repr(self)


@contextmanager
def instead_of_launching() -> Iterator[list[KernelJob]]:
    """Within it kernels that are not compiled yet are noted; they are neither compiled nor run."""
    from triton import knobs
    from triton.runtime.driver import driver

    jobs: list[KernelJob] = []
    target = driver.active.get_current_target()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:  # triton's names
        options = json.loads(compile["specialization_data"])["options"]
        job = KernelJob(
            fn.module,
            fn.name,
            dict(compile["signature"]),
            dict(compile["constants"]),
            dict(compile["configs"][0]),
            {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()},
            (target.backend, target.arch, target.warp_size),
        )
        jobs.append(job)
        return True

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        yield jobs
    finally:
        knobs.runtime.jit_cache_hook = before


def compile_job(job: KernelJob) -> str:
    """Compiles into the cache; the reason if triton cannot."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(job.module), job.function)
    source = ASTSource(fn=function, signature=job.signature, constexprs=job.constants, attrs=job.attributes)
    try:
        triton.compile(source, target=GPUTarget(*job.target), options=job.options)
    except Exception as error:  # triton raises RuntimeError, its own classes, and what its passes raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"triton cannot compile it: {lines[0]}"
    return ""


class Compilers:
    """Processes that compile; each kernel once."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        self._jobs: dict[str, Future[str]] = {}

    def submit(self, job: KernelJob) -> "Future[str]":
        """Begins a kernel if it was not begun before; see `answer`."""
        key = job.key()
        if key not in self._jobs:
            try:
                self._jobs[key] = self._pool.submit(compile_job, job)
            except BrokenProcessPool:
                self._jobs[key] = Future()
                self._jobs[key].set_result("")
        return self._jobs[key]


def answer(begun: "Future[str]") -> str:
    """What `compile_job` said; nothing if the processes died (of too little memory): the launch compiles then."""
    try:
        return begun.result()
    except BrokenProcessPool:
        return ""


@contextmanager
def compilers(processes: int | None = None) -> Iterator[Compilers]:
    """As many processes as there is memory for, at most `processes`.

    processes: by default as many as there are cores, less one for the process that measures.
    """
    cores = available_cores()
    memory = available_bytes()
    room = _MOST if memory is None else memory // _BYTES
    count = max(1, min(cores - 1 if processes is None else processes, room, _MOST))
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_polite)
    try:
        yield Compilers(pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _polite() -> None:
    """The process that measures comes first."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(5)
