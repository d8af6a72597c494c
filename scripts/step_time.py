"""Times a float distillation step against a QAT step on `digits`: same batch, teacher and optimiser, interleaved.

The float step trains every weight of a float copy against the teacher; the QAT step trains LoRA and scales of the
quantised graph. Both run teacher forward, student forward and backward, AdamW.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from hqc.api import quantise, task_of
from hqc.capture import trace
from hqc.console import console
from hqc.program import Program
from hqc.recipes import find_recipe
from hqc.sampling import Task
from hqc.sampling.task import guided, start


def float_step(teacher: Program, task: Task, batch: int) -> Callable[[], None]:
    """One update of a float student against the float teacher."""
    teacher_module, student = teacher.module(), teacher.module().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    sample, conditions = start(task, batch, torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.no_grad():
            wanted = guided(teacher_module, sample, 500.0, conditions, 1.5)
        loss = (guided(student, sample, 500.0, conditions, 1.5) - wanted).square().sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Prints both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="hqc")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    program = trace("digits")
    task = task_of(program)
    recipe = find_recipe(options.recipe).having("distil", updates=options.steps, batch_size=options.batch_size)
    plain = float_step(program, task, options.batch_size)
    floats: list[float] = []
    qats: list[float] = []

    def between(record) -> None:  # type: ignore[no-untyped-def]
        qats.append(record.seconds)
        began = time.perf_counter()
        plain()
        floats.append(time.perf_counter() - began)

    quantise(program, recipe, options.bits, task=task, on_update=between)
    skip = min(5, options.steps // 4)
    result = {
        "float_step_ms": round(1e3 * statistics.median(floats[skip:]), 1),
        "qat_step_ms": round(1e3 * statistics.median(qats[skip:]), 1),
        "recipe": options.recipe,
        "batch_size": options.batch_size,
        "threads": options.threads,
    }
    result["ratio"] = round(result["qat_step_ms"] / result["float_step_ms"], 2)
    console.print_json(json.dumps(result)) if options.json else console.print(result)


if __name__ == "__main__":
    main()
