"""Sessions that take few rows at once, or few numbers of them: engines and captured graphs behind the server."""

import doctest
import logging
import random
from collections.abc import Iterator
from concurrent.futures import wait
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hqc.errors import EvaluationError
from hqc.program import BATCH, InputSpec
from hqc.runtimes.integer.cuda.graphs import Captured, GraphCache
from hqc.runtimes.integer.cuda.session import CudaSession, HalfSession
from hqc.runtimes.trt.session import TensorRtSession
from hqc.serving import rows
from hqc.serving.engine import Engine
from hqc.serving.opening import warn_of_slow
from hqc.serving.rendezvous import together
from hqc.serving.rows import RowRule
from hqc.serving.split import Split
from hqc.serving.tickets import Call


class Rows:
    """A denoiser that gives each sample plus its timestep, and remembers how many rows its calls had."""

    name = "tensorrt"
    inputs = (InputSpec("sample", (BATCH, 1)), InputSpec("timestep", (BATCH,)), InputSpec("ids", (2,)))

    def __init__(self, batches: tuple[int, int] | None = None, *, few: bool = False) -> None:
        self.calls: list[int] = []
        self.few_batches = few
        if batches is not None:
            self.batches = batches

    def __call__(self, sample: Any, timestep: Any, ids: Any) -> Any:
        least, most = getattr(self, "batches", (1, 999))
        if not least <= len(sample) <= most:
            raise EvaluationError(f"batch of {len(sample)}", f"lies outside of {least}…{most}", "Widen it.")
        assert ids.shape == (2,)
        self.calls.append(len(sample))
        return sample + timestep[:, None]


def call(rows: int, value: float) -> Call:
    sample = value + torch.arange(float(rows)).view(rows, 1)
    return Call({"sample": sample, "timestep": torch.full((rows,), 0.5), "ids": torch.zeros(2)}, rows)


@pytest.mark.parametrize(
    ("session", "images", "calls"),
    [
        (Rows(), [2] * 8, [16]),
        (Rows((1, 8)), [2] * 8, [8, 8]),
        (Rows((1, 8)), [2, 1, 2, 2, 2, 2], [8, 3]),
        (Rows((1, 3)), [2, 2], [3, 1]),  # an image's two halves in different calls
        (Rows((1, 1)), [2], [1, 1]),
        (Rows((4, 4)), [2, 1], [4]),
        (Rows((4, 6)), [2] * 4, [6, 4]),
        (Rows(few=True), [2, 1, 2], [8]),
        (Rows((1, 8), few=True), [2] * 5 + [1], [8, 4]),
        (Rows((1, 6), few=True), [5], [6]),
    ],
)
def test_rows_come_in_calls_that_the_session_takes(session: Rows, images: list[int], calls: list[int]) -> None:
    wanted = [call(count, 10.0 * index) for index, count in enumerate(images)]
    found = together(session, wanted, Split())  # type: ignore[arg-type]
    assert session.calls == calls
    for output, one in zip(found, wanted, strict=True):
        assert torch.equal(output, one.inputs["sample"] + 0.5)


def test_eight_guided_images_behind_an_engine_of_eight_rows(caplog: pytest.LogCaptureFixture) -> None:
    """None of their calls fails, so that none is made again image by image."""
    session, split = Rows((1, 8), few=True), Split()

    def image(index: int) -> Iterator[Call]:
        for step in range(5):
            yield call(2, 100.0 * index + step)

    engine = Engine(lambda calls, at_once: together(session, calls, split, at_once), max_batch=8, policy="static")  # type: ignore[arg-type]
    try:
        ticket = engine.submit([lambda index=index: image(index) for index in range(8)])  # type: ignore[misc]
        ticket.result.result(30)
    finally:
        engine.close()
    assert session.calls == [8, 8] * 5
    assert not caplog.records


def test_a_mix_of_requests_captures_few_graphs() -> None:
    """Up to sixteen rows at once: with one graph for each number of rows the four of before were captured anew."""
    captured: list[int] = []
    calls: list[int] = []

    def capture(module: Any, inputs: tuple[Any, ...]) -> Captured:
        captured.append(len(inputs[0]))
        output = module(*inputs)
        return Captured(inputs, output, lambda: output.copy_(module(*inputs)))

    cache, split, rng = (
        GraphCache(lambda sample, timestep, _: sample + timestep[:, None], capture),
        Split(),
        random.Random(0),
    )

    class Graphs:
        inputs, few_batches = Rows.inputs, True

        def __call__(self, sample: Any, timestep: Any, ids: Any) -> Any:
            calls.append(len(sample))
            return cache([sample, timestep, ids])

    graphs: Any = Graphs()
    lengths = [(rng.randint(10, 30), rng.choice([1, 2, 2])) for _ in range(60)]

    def image(steps: int, count: int) -> Iterator[Call]:
        for step in range(steps):
            wanted = call(count, float(step))
            output = yield wanted
            assert torch.equal(output, wanted.inputs["sample"] + 0.5)

    engine = Engine(
        lambda calls, at_once: together(graphs, calls, split, at_once),
        max_batch=8,
        max_queue=99,
        policy="continuous",
    )
    try:
        tickets = [engine.submit([lambda one=one: image(*one)]) for one in lengths]  # type: ignore[misc]
        done, _ = wait([ticket.result for ticket in tickets], 60)
        assert [future.exception() for future in done] == [None] * len(lengths)
    finally:
        engine.close()
    assert set(captured) <= {1, 2, 4, 8, 16}
    assert len(captured) == len(set(captured))
    assert len(calls) > 100


def test_examples_of_the_rule() -> None:
    outcome = doctest.testmod(rows)
    assert (outcome.attempted, outcome.failed) == (2, 0)


def test_sessions_on_a_gpu_say_that_new_batch_sizes_cost() -> None:
    assert CudaSession.few_batches
    assert HalfSession.few_batches
    assert TensorRtSession.few_batches
    session: Any = Rows((2, 8), few=True)
    assert RowRule.of(session) == RowRule(2, 8, True)
    plain: Any = SimpleNamespace()
    assert RowRule.of(plain) == RowRule(1, None, False)


def test_what_makes_images_share_no_calls_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_slow("engine", Rows((1, 1)))  # type: ignore[arg-type]
        warn_of_slow("engine", Rows((1, 8)))  # type: ignore[arg-type]
        warn_of_slow("model", Rows())  # type: ignore[arg-type]
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("engine takes one row a call: images share none, and guidance is two calls. ")
    assert "hqc build-engine engine --max-batch" in text
