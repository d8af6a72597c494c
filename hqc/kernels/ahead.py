"""Kernels compiled into triton's cache by other processes, while this one compiles the same list from its front.

    this process    job 0, 1, 2, …           the other processes    … n-3, n-2, n-1

Where they meet, the rest is there already. Nothing depends on it: what is not in the cache is compiled as ever, and a
process that fails or dies is not missed. Processes, not threads: Python's parser, which triton calls, is not safe in
several threads before Python 3.13.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from hqc.kernels.compile import cache_kernel
from hqc.machine import available_cores
from hqc.memory import available_bytes

__all__ = ["Compilation", "compiled_ahead", "main"]

Compilation: TypeAlias = tuple[str, str, Mapping[str, Any], str]
"""Kernel, dtype, options and architecture, as `compile_kernel` takes them."""

_WORTH_A_PROCESS = 16
"""Jobs for each process; fewer take less time than the imports of another one."""
_BYTES = 1 << 30
_MOST = 32


@contextmanager
def compiled_ahead(jobs: Sequence[Compilation]) -> Iterator[None]:
    """Within it other processes compile the jobs from the last one on; they end with it."""
    memory = available_bytes()
    room = _MOST if memory is None else memory // _BYTES
    count = max(0, min(available_cores() - 1, len(jobs) // _WORTH_A_PROCESS, room, _MOST))
    begun = [_begin(jobs[::-1][i::count]) for i in range(count)]
    try:
        yield
    finally:
        for process in begun:
            process.kill()
            process.wait()


def _begin(jobs: Sequence[Compilation]) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-m", "hqc.kernels.ahead"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    with contextlib.suppress(OSError), process.stdin as stdin:  # it may be dead already
        stdin.write(json.dumps(jobs).encode())
    return process


def main() -> None:
    """The other process: compiles the jobs on standard input; what goes wrong is said by the one that needs it."""
    for kernel, dtype, options, arch in json.load(sys.stdin):
        with contextlib.suppress(Exception):
            cache_kernel(kernel, dtype, options, arch)


if __name__ == "__main__":
    main()
