"""Where the time of a tape's call goes: every step and every call of torch timed on its own."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from hqc.program import aten
from hqc.runtimes.integer.cpu.products import LaterProduct
from hqc.runtimes.integer.cpu.steps import Attention, Gate, Product, step_fields
from hqc.runtimes.integer.cpu.tape import Call, Run, Tape

__all__ = ["Kind", "profile"]

_STEPS = {
    "Quantise": "rotate + quantise",
    "GroupNormFields": "group norm + SiLU + rotate + quantise",
    "LayerNormFields": "layer norm + rotate + quantise",
    "Attention": "attention",
    "Nearest": "rows of scales",
    "LookUp": "rows of scales",
}
_CALLS = {
    aten.scaled_dot_product_attention.default: "attention, torch",
}


@dataclass(frozen=True)
class Kind:
    """Parts of one kind in a call. multiplications: of products and of hqc's own attention; 0 of anything else."""

    name: str
    parts: int
    milliseconds: float
    multiplications: int

    @property
    def rate(self) -> float:
        """Multiply-adds a second, in 10⁹."""
        return self.multiplications / self.milliseconds / 1e6 if self.milliseconds else 0.0


def profile(tape: Tape, inputs: Sequence[Tensor], runs: int = 5) -> tuple[Kind, ...]:
    """The parts of a call by kind, the most expensive first; of each part its least time in some runs."""
    apart = tape.apart()
    times = [_seconds(apart, inputs) for _ in range(runs + 1)][1:]  # the first one warms up
    return _by_kind(apart, map(min, zip(*times, strict=True)))


def _seconds(tape: Tape, inputs: Sequence[Tensor]) -> list[float]:
    """Of every part, in one call."""
    clock = [time.perf_counter()]
    tape.play(inputs, lambda: clock.append(time.perf_counter()))
    return [end - begin for begin, end in pairwise(clock)]


def _by_kind(tape: Tape, seconds: Iterable[float]) -> tuple[Kind, ...]:
    found: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for part, took in zip(tape.parts, seconds, strict=True):
        name, multiplications = _of_call(part) if isinstance(part, Call) else _of_step(tape, part)
        found[name].append((took, multiplications))
    kinds = [
        Kind(name, len(parts), 1e3 * sum(took for took, _ in parts), sum(count for _, count in parts))
        for name, parts in found.items()
    ]
    return tuple(sorted(kinds, key=lambda kind: -kind.milliseconds))


def _of_call(call: Call) -> tuple[str, int]:
    function: Any = call.function
    if isinstance(function, LaterProduct):
        return function.product.name, function.product.multiplications(call.args[0].shape, function.upsample)
    return _CALLS.get(function, f"torch: {getattr(function, '__name__', function)}"), 0


def _of_step(tape: Tape, run: Run) -> tuple[str, int]:
    step = step_fields(tape.steps[run.first])
    if isinstance(step, Product):
        return _of_product(step)
    if isinstance(step, Gate):
        return ("GEGLU" if step.gated else "activation") + " + rotate + quantise", 0
    count = 0
    if isinstance(step, Attention):
        count = step.samples * step.heads * step.queries * step.keys * (step.depth + step.width)
    return _STEPS[type(step).__name__], count


def _of_product(step: Product) -> tuple[str, int]:
    kernel = math.prod(step.kernel)
    places = step.samples * math.prod(step.size)
    name = "convolutions" if kernel > 1 else "linear layers and 1×1 convolutions"
    return f"{name}, hqc", places * kernel * step.channels * step.outputs
