"""Where the time of a denoiser call goes in the `torch-int8` runtime: kernels by kind.

    cpu_profile.py PROGRAM [--batch-size 2] [--threads N] [--runs 5] [--json]

Each kernel is timed on its own, its least time in some runs counts; a whole
call's median is of the same process.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hqc.errors import HqcError, RuntimeMissingError
from hqc.program import Program
from hqc.runtimes.integer.cpu import CpuSession
from hqc.runtimes.integer.cpu.profile import profile
from hqc.storage import load_program


def at_one_timestep(program: Program, batch: int) -> tuple[torch.Tensor, ...]:
    """Inputs as a sampler gives them; those of a program have timesteps that differ."""
    given = zip(program.inputs, program.example_inputs(batch), strict=True)
    return tuple(x[:1].expand_as(x) if spec.name == "timestep" else x for spec, x in given)


def profile_program(path: Path, batch: int, runs: int) -> dict[str, Any]:
    """The kinds of a call at one timestep, and the median of whole calls, ms.

    Raises:
        HqcError: for a program that the runtime does not take, and where calls are not recorded.
    """
    program = load_program(path)
    session = CpuSession(program)
    inputs = at_one_timestep(program, batch)
    tape = session.tape(*inputs)
    if tape is None:
        raise RuntimeMissingError("the tape", f"there is none: {session.report.tiles}", "Install g++, or set CXX.")
    kinds, calls = profile(tape, inputs, runs), []
    for _ in range(runs):
        began = time.perf_counter()
        session(*inputs)
        calls.append(1e3 * (time.perf_counter() - began))
    return {
        "program": path.name,
        "batch_size": batch,
        "threads": torch.get_num_threads(),
        "call_ms": statistics.median(calls),
        "kernels_ms": sum(kind.milliseconds for kind in kinds),
        "kinds": [{**vars(kind), "rate": kind.rate} for kind in kinds],
    }


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    head = f"{found['program']}, batch {found['batch_size']}, {found['threads']} threads: "
    head += f"{found['kernels_ms']:.2f} ms of kernels, {found['call_ms']:.2f} ms a call"
    lines = [head, "", "| kind | kernels | ms | G multiply-adds a second |", "|---|---|---|---|"]
    for kind in found["kinds"]:
        rate = f"{kind['rate']:.0f}" if kind["multiplications"] else ""
        lines.append(f"| {kind['name']} | {kind['parts']} | {kind['milliseconds']:.2f} | {rate} |")
    return "\n".join(lines)


def main() -> int:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, metavar="PROGRAM")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        found = profile_program(options.program, options.batch_size, options.runs)
    except HqcError as error:
        parser.exit(2, f"cpu_profile: {error.line}\n")
    print(json.dumps(found, indent=1) if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
