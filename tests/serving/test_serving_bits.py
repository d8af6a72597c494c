"""An image does not depend on what shares its calls: to the bit on integer kernels, by a bound where codes are floats.

The real `digits` at w4a4, in random mixes of classes, steps, guidance, noise and schedulers.
"""

import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_images import drawn

import hqc
from hqc.program import Program
from hqc.runtimes.model import Model
from hqc.serving.backend import Drawing
from hqc.serving.engine import Engine
from hqc.serving.pipelines import PipelineBackend
from hqc.serving.tickets import Call, Steps, Ticket

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
GUIDED = (1.5, 4.0)
Open = Callable[[str], PipelineBackend]
Images = Sequence[Any]


@pytest.fixture(scope="module")
def opened(few_digits: Program, native_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """The quantised model on a runtime, its export for a target, or the float one, behind the engine."""
    work, made = tmp_path_factory.mktemp("bits"), {}

    def load(name: str) -> Model:
        if name == "float":
            return hqc.load("digits")
        if name in ("onnxruntime", "portable"):
            hqc.export_program(few_digits, name, work / name)  # type: ignore[arg-type]
            return hqc.load(work / name, threads=1)
        program = work / "q.hqc"
        if not program.exists():
            hqc.save_program(few_digits, program)
        return hqc.load(program, runtime=name, cache=native_cache if name == "torch-int8" else None)  # type: ignore[arg-type]

    def backend(name: str) -> PipelineBackend:
        if name not in made:
            made[name] = PipelineBackend(load(name).pipeline())
        return made[name]

    return backend


def mix(
    backend: PipelineBackend, seed: int, guidance: Sequence[float] = (1.0, *GUIDED), count: int = 10
) -> list[Drawing]:
    rng = random.Random(seed)
    names = [None, *backend.schedulers]
    assert {"ddim", "euler", "dpmsolver++"} <= set(names)
    return [
        Drawing(
            rng.randrange(10),
            None,
            "",
            rng.randrange(10**6),
            rng.randint(4, 7),
            rng.choice(guidance),
            eta=rng.choice([0.0, 1.0]),
            scheduler=rng.choice(names),
        )
        for _ in range(count)
    ]


def distance(found: Images, wanted: Images) -> float:
    """The mean absolute difference of pixels, in grey levels."""
    return float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(found, wanted, strict=True)]))


# ---- integer kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("runtime", ["onnxruntime", "torch-int8"])
def test_integer_kernels_draw_the_same_bits_in_any_mix(runtime: str, seed: int, opened: Open) -> None:
    backend = opened(runtime)
    wanted = mix(backend, seed)
    alone, ones = drawn(backend, wanted, max_batch=1)
    together, batches = drawn(backend, wanted, max_batch=8)
    assert max(ones) == 1
    assert max(batches) == 8
    others = [together]
    if runtime == "onnxruntime":  # torch-int8 takes one call at a time
        beside, shared = drawn(backend, wanted, max_batch=8, lanes=2)
        assert max(shared) == 4
        others += [beside, drawn(backend, wanted, max_batch=8, lanes=2, policy="adaptive")[0]]
    for images in others:
        for one, other in zip(alone, images, strict=True):
            np.testing.assert_array_equal(one, other)


class Crowd:
    """Requests that come one after the other between the steps of those before, and some that end before their time."""

    def __init__(self, backend: PipelineBackend, wanted: Sequence[Drawing], seed: int, lanes: int) -> None:
        self.backend, self.rng, self.lock = backend, random.Random(seed), threading.Lock()
        self.kept: dict[int, Ticket] = {}
        self.leaving: list[Ticket] = []
        self.breaking: list[Ticket] = []
        self.most = 0
        coming = [partial(self.keep, index, drawing) for index, drawing in enumerate(wanted)]
        coming += [partial(other, self.rng.choice(wanted)) for other in (self.leave, self.fail, self.misshape) * 4]
        self.rng.shuffle(coming)
        self.coming = deque(coming)
        self.engine = Engine(
            backend.denoise,
            lanes=lanes,
            max_batch=6,
            max_queue=99,
            policy="continuous",
            around=backend.around,
            observer=self,
        )

    def step(self, images: int, rows: int, seconds: float) -> None:
        """See `Observer`: the next comes, and a client leaves."""
        self.most = max(self.most, images)
        if self.rng.random() < 0.5:
            self.come()
        if self.leaving and self.rng.random() < 0.3:
            self.rng.choice(self.leaving).cancel()

    def ended(self, ticket: Ticket, error: BaseException | None) -> None:
        """See `Observer`: whoever ends makes room."""
        self.come()

    def come(self) -> None:
        with self.lock:
            if self.coming:
                self.coming.popleft()()

    def keep(self, index: int, drawing: Drawing) -> None:
        self.kept[index] = self.engine.submit([lambda: self.backend.begin(drawing)])

    def leave(self, drawing: Drawing) -> None:
        self.leaving.append(self.engine.submit([lambda: self.backend.begin(drawing)] * 2))

    def fail(self, drawing: Drawing) -> None:
        self.breaking.append(self.engine.submit([lambda: _failing(self.backend.begin(drawing), 2)]))

    def misshape(self, drawing: Drawing) -> None:
        self.breaking.append(self.engine.submit([lambda: _misshapen(self.backend.begin(drawing))]))

    def run(self) -> None:
        """Until all have come and ended."""
        try:
            for _ in range(3):
                self.come()
            while self.coming:
                self.wait()
            self.wait()
        finally:
            self.engine.close()

    def wait(self) -> None:
        with self.lock:
            there = [*self.kept.values(), *self.leaving, *self.breaking]
        for ticket in there:
            end_of(ticket)


def end_of(ticket: Ticket) -> str:
    """What became of a request."""
    try:
        ticket.result.result(60)
    except (Exception, CancelledError) as error:
        return type(error).__name__
    return "drawn"


def _failing(steps: Steps, after: int) -> Iterator[Any]:
    """An image that breaks off by itself after some calls."""
    output, calls = None, 0
    while True:
        wanted = steps.send(output)
        calls += isinstance(wanted, Call)
        if calls > after:
            steps.close()
            raise RuntimeError("breaks off")
        output = yield wanted


def _misshapen(steps: Steps) -> Iterator[Any]:
    """An image whose third call cannot be made, nor that of those who share it."""
    output, calls = None, 0
    while True:
        wanted = steps.send(output)
        calls += isinstance(wanted, Call)
        if calls == 3:
            assert isinstance(wanted, Call)
            wanted = Call({**wanted.inputs, "sample": torch.zeros(wanted.rows, 1, 1, 1)}, wanted.rows)
        try:
            output = yield wanted
        except Exception:
            steps.close()
            raise


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("runtime", "lanes"), [("onnxruntime", 1), ("onnxruntime", 2), ("torch-int8", 1)])
def test_the_same_bits_while_others_join_leave_and_fail(runtime: str, lanes: int, seed: int, opened: Open) -> None:
    backend = opened(runtime)
    wanted = mix(backend, 100 + seed, count=8)
    alone, _ = drawn(backend, wanted, max_batch=1)
    crowd = Crowd(backend, wanted, seed, lanes)
    crowd.run()
    for index, one in enumerate(alone):
        np.testing.assert_array_equal(one, crowd.kept[index].result.result(0)[0])
    assert crowd.most >= 2
    assert "CancelledError" in map(end_of, crowd.leaving)
    assert Counter(map(end_of, crowd.breaking))["RuntimeError"] >= 4  # and those whose call could not be made
    assert "drawn" not in map(end_of, crowd.breaking)


# ---- floats that stand for codes -----------------------------------------------------------------------------------


def test_portable_draws_the_same_bits_where_calls_have_two_rows_and_more(opened: Open) -> None:
    """One row alone is a product of a vector, which ONNX Runtime sums in another order."""
    backend = opened("portable")
    wanted = mix(backend, 0, GUIDED)
    alone, _ = drawn(backend, wanted, max_batch=1)
    together, batches = drawn(backend, wanted, max_batch=8)
    assert max(batches) == 8
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("runtime", ["portable", pytest.param("torch", marks=pytest.mark.long)])
def test_rounding_that_moves_a_code_is_small_beside_the_quantisation(runtime: str, opened: Open) -> None:
    """Sums in another order move values between two codes by a whole step, which later layers see."""
    backend, real = opened(runtime), opened("float")
    wanted = mix(backend, 0)
    alone, _ = drawn(backend, wanted, max_batch=1)
    together, _ = drawn(backend, wanted, max_batch=8)
    unquantised, _ = drawn(real, wanted, max_batch=8)
    assert distance(together, alone) < 0.5 * distance(alone, unquantised)
