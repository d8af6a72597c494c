"""Compiles the kernels that a program will launch into triton's cache, on every core at once.

    kernel_warm.py PROGRAM [--batch-size 8,2,32,1] [--kernel-bench] [--workers N]

The program's module runs once a batch size with launches written down instead of made; processes without a GPU context
compile each different one. --kernel-bench: the kernels of kernel_bench.py too.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hqc.kernels.precompile import KernelJob, answer, compilers, instead_of_launching


def compile_all(jobs: Sequence[KernelJob], workers: int) -> list[str]:
    """What went wrong, of all."""
    with compilers(workers) as pool:
        begun = [(job.function, pool.submit(job)) for job in jobs]
        return [f"{function}: {said}" for function, future in begun if (said := answer(future))]


# ---- what is launched ----------------------------------------------------------------------------------------------


def of_program(folder: Path, batches: Sequence[int]) -> list[KernelJob]:
    """Launches of the program's session."""
    from hqc.kernels.cards import card_of
    from hqc.kernels.tuning import load_tuning, use
    from hqc.runtimes.integer.cuda.session import CudaSession
    from hqc.storage import load_program

    program = load_program(folder)
    session = CudaSession(program)
    table, _ = load_tuning("auto", card_of(session.device))  # as the session captures
    with use(table), instead_of_launching() as found, torch.no_grad():
        for batch in batches:
            session.module(*(tensor.cuda() for tensor in program.example_inputs(batch)))
            torch.cuda.synchronize()
    return found


def of_kernel_bench() -> list[KernelJob]:
    """Launches of every contender of kernel_bench.py that is hqc's."""
    import kernel_bench

    with instead_of_launching() as found, torch.no_grad():
        for cases in kernel_bench.KINDS.values():
            for case in cases():
                for name, contender in case.contenders.items():
                    if not name.startswith(("fp16", "CUTLASS", "copy")):
                        contender.make(0)()
    return found


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
    jobs = of_program(arguments.program, [int(size) for size in arguments.batch_size.split(",")])
    if arguments.kernel_bench:
        jobs += of_kernel_bench()
    found = time.monotonic()
    different = list({job.key(): job for job in jobs}.values())
    failed = compile_all(different, arguments.workers)
    seconds = f"{found - start:.1f} s to find, {time.monotonic() - found:.1f} s to compile"
    print(f"{len(different)} kernels, {len(failed)} failed, {seconds}, {arguments.workers} processes")
    for said in failed[:5]:
        print(said, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
