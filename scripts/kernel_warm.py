"""Compiles the kernels that a program will launch into triton's cache, on every core at once.

    kernel_warm.py PROGRAM [--batch-size 8,2,32,1] [--kernel-bench] [--workers N]

The program's module runs once a batch size with launches written down instead of made; processes without a GPU context
compile each different one. --kernel-bench: the kernels of kernel_bench.py too.
"""

import argparse
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """What decides how triton compiles a launch: the function, its arguments' types, its constants and settings.

    arguments: dtypes of tensors; of integers only whether they are 1 or multiples of 16.
    """

    module: str
    name: str
    arguments: tuple[Any, ...]
    settings: tuple[tuple[str, Any], ...]


def described(module: str, name: str, arguments: Sequence[Any], settings: dict[str, Any]) -> Launch | None:
    """A launch without what does not matter; None where a tensor is not aligned as the compiler supposes."""
    if any(isinstance(value, torch.Tensor) and value.data_ptr() % 16 for value in arguments):
        return None
    return Launch(
        module, name, tuple(map(_plain, arguments)), tuple((key, _plain(v, True)) for key, v in settings.items())
    )


def _plain(value: Any, exact: bool = False) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype
    if exact or isinstance(value, bool) or not isinstance(value, int) or value == 1 or abs(value) >= 2**31:
        return value
    return 16 if value % 16 == 0 else 3


@contextmanager
def recording() -> Iterator[dict[Launch, None]]:
    """Inside, triton launches nothing; what it would have launched is collected, each once, in order."""
    from triton.runtime.jit import JITFunction

    found: dict[Launch, None] = {}
    before = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        launch = described(self.fn.__module__, self.fn.__name__, arguments, settings)
        if launch is not None:
            found[launch] = None

    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = before


class NoDriver:
    """What triton asks of a driver in order to compile for a card, without the card."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def start_worker(capability: int) -> None:
    """In each process of the pool."""
    from triton.runtime import driver

    driver.set_active(NoDriver(capability))


def compile_launch(launch: Launch) -> str:
    """Into the cache on disk; what went wrong, or nothing."""
    try:
        kernel = getattr(importlib.import_module(launch.module), launch.name)
        kernel.warmup(*launch.arguments, grid=(1,), **dict(launch.settings))
    except Exception as error:  # the real launch will say so
        return f"{launch.name}: {type(error).__name__}: {error}"[:300]
    return ""


def compile_all(launches: Sequence[Launch], capability: int, workers: int) -> list[str]:
    """What went wrong, of all."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(capability,)) as pool:
        return [said for said in pool.map(compile_launch, launches) if said]


# ---- what is launched ----------------------------------------------------------------------------------------------


def of_program(folder: Path, batches: Sequence[int]) -> list[Launch]:
    """Launches of the program's session."""
    from hqc.kernels.cards import card_of
    from hqc.kernels.tuning import load_tuning, use
    from hqc.runtimes.cuda.session import CudaSession
    from hqc.storage import load_program

    program = load_program(folder)
    session = CudaSession(program)
    table, _ = load_tuning("auto", card_of(session.device))  # as the session captures
    with use(table), recording() as found, torch.no_grad():
        for batch in batches:
            session.module(*(tensor.cuda() for tensor in program.example_inputs(batch)))
            torch.cuda.synchronize()
    return list(found)


def of_kernel_bench() -> list[Launch]:
    """Launches of every contender of kernel_bench.py that is hqc's."""
    import kernel_bench

    with recording() as found, torch.no_grad():
        for cases in kernel_bench.KINDS.values():
            for case in cases():
                for name, contender in case.contenders.items():
                    if not name.startswith(("fp16", "CUTLASS", "copy")):
                        contender.make(0)()
    return list(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, metavar="PROGRAM")
    parser.add_argument("--batch-size", default="8,2,32,1", metavar="SIZES")
    parser.add_argument("--kernel-bench", action="store_true")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "kernel_warm: torch finds no CUDA device\n")
    start = time.monotonic()
    launches = of_program(arguments.program, [int(size) for size in arguments.batch_size.split(",")])
    if arguments.kernel_bench:
        launches += of_kernel_bench()
    found = time.monotonic()
    major, minor = torch.cuda.get_device_capability()
    failed = compile_all(list(dict.fromkeys(launches)), 10 * major + minor, arguments.workers)
    seconds = f"{found - start:.1f} s to find, {time.monotonic() - found:.1f} s to compile"
    print(f"{len(set(launches))} kernels, {len(failed)} failed, {seconds}, {arguments.workers} processes")
    for said in failed[:5]:
        print(said, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
