"""The engine with images of numbers: what shares a call, what leaves, what fails, and that no image notices."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

from hqc.serving.engine import Engine, Policy
from hqc.serving.errors import Busy, Stopped, TimeUp
from hqc.serving.tickets import Begin, Call, Steps, Task, Ticket

WAIT_S = 20


class Denoiser:
    """x/2 + t, row by row; can be held at a gate, and fails on a row of NaN."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.at_once: list[int] = []
        self.gate: threading.Event | None = None
        self.entered = threading.Semaphore(0)

    def __call__(self, calls: Sequence[Call], at_once: int = 1) -> list[Any]:
        self.batches.append([float(call.inputs["t"]) for call in calls])
        self.at_once.append(at_once)
        self.entered.release()
        if self.gate is not None:
            assert self.gate.wait(WAIT_S)
        x = np.concatenate([call.inputs["x"] for call in calls])
        if np.isnan(x).any():
            raise FloatingPointError("NaN")
        rows = np.concatenate([np.full(call.rows, call.inputs["t"]) for call in calls])
        return np.split(x / 2 + rows, np.cumsum([call.rows for call in calls])[:-1])


def image(seed: int, steps: int, rows: int = 2, fails_at: int | None = None) -> Begin:
    """Numbers that depend on the seed and on what the denoiser says at each of the steps."""

    def begin() -> Steps:
        x = np.random.default_rng(seed).normal(size=rows)
        for step in range(steps):
            if step == fails_at:
                raise ValueError(f"image {seed}")
            output = yield Call({"x": x, "t": float(seed + step)}, rows)
            x = output - x
        return x

    return begin


def alone(begin: Begin) -> Any:
    steps, denoiser = begin(), Denoiser()
    try:
        call = next(steps)
        while True:
            call = steps.send(denoiser([call])[0])
    except StopIteration as end:
        return end.value


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser()


@pytest.fixture
def engine(denoiser: Denoiser) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(denoiser, **{"policy": "continuous", **options}))
        return made[-1]

    yield make
    if denoiser.gate is not None:
        denoiser.gate.set()
    for each in made:
        each.close()


def held(denoiser: Denoiser, engine: Engine, *begins: Begin) -> Ticket:
    """A request whose first call of the denoiser waits at the gate."""
    denoiser.gate = threading.Event()
    ticket = engine.submit(begins)
    assert denoiser.entered.acquire(timeout=WAIT_S)
    return ticket


@pytest.mark.parametrize("policy", ["adaptive", "continuous"])
@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_images_are_equal_to_the_bit_whatever_is_beside_them(
    seed: int, lanes: int, policy: Policy, engine: Callable[..., Engine], denoiser: Denoiser
) -> None:
    rng = random.Random(seed)
    running = engine(max_batch=lanes * rng.randint(2, 5), max_queue=100, lanes=lanes, policy=policy)
    asked = [image(n, rng.randint(1, 9), rng.choice([1, 2])) for n in range(20)]
    tickets: list[tuple[Begin, Ticket]] = []
    for begin in asked:
        tickets.append((begin, running.submit([begin])))
        beside = rng.random()
        if beside < 0.2:
            running.submit([image(99, 5, fails_at=rng.randint(0, 4))])
        elif beside < 0.4:
            running.submit([image(98, 50)]).cancel()
        if rng.random() < 0.3:
            time.sleep(0.002)
    for begin, ticket in tickets:
        (found,) = ticket.result.result(WAIT_S)
        np.testing.assert_array_equal(found, alone(begin))
    if policy == "adaptive":  # which are beside each other depends on what steps cost here
        return
    assert max(map(len, denoiser.batches)) > 1
    assert any(len(set(batch)) > 1 for batch in denoiser.batches)  # steps of their own


def test_a_request_has_its_images_in_order(engine: Callable[..., Engine]) -> None:
    begins = [image(n, steps) for n, steps in enumerate([5, 1, 3, 2])]
    found = engine(max_batch=2).submit(begins).result.result(WAIT_S)
    for begin, each in zip(begins, found, strict=True):
        np.testing.assert_array_equal(each, alone(begin))


@pytest.mark.parametrize(
    ("policy", "sizes"),
    [
        # While the first image of three steps is at its first, images of one step each come: two fit beside it.
        ("continuous", [1, 2, 2]),
        ("static", [1, 1, 1, 2]),
        ("single", [1, 1, 1, 1, 1]),
    ],
)
def test_policies_admit_while_there_is_room_or_into_an_empty_batch_or_alone(
    policy: Policy, sizes: list[int], engine: Callable[..., Engine], denoiser: Denoiser
) -> None:
    running = engine(max_batch=2, policy=policy)
    first = held(denoiser, running, image(0, 3))
    others = [running.submit([image(n, 1)]) for n in (1, 2)]
    assert denoiser.gate is not None
    denoiser.gate.set()
    for ticket in (first, *others):
        ticket.result.result(WAIT_S)
    assert [len(batch) for batch in denoiser.batches] == sizes


def test_lanes_run_their_shares_side_by_side(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    denoiser.gate = threading.Event()
    begins = [image(n, 2) for n in range(5)]
    ticket = engine(max_batch=8, lanes=2).submit(begins)
    for _ in range(2):  # the second call runs while the first one waits at the gate
        assert denoiser.entered.acquire(timeout=WAIT_S)
    assert sorted(map(len, denoiser.batches)) == [2, 3]
    denoiser.gate.set()
    for begin, found in zip(begins, ticket.result.result(WAIT_S), strict=True):
        np.testing.assert_array_equal(found, alone(begin))
    assert denoiser.at_once[:2] == [1, 1]


def test_an_image_alone_may_have_all_lanes(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    engine(lanes=3).submit([image(0, 2)]).result.result(WAIT_S)
    assert denoiser.at_once == [3, 3]


def test_an_image_joins_while_a_lane_runs(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    running = engine(max_batch=2, lanes=2)
    held(denoiser, running, image(0, 1))
    running.submit([image(1, 1)])
    assert denoiser.entered.acquire(timeout=WAIT_S)
    assert denoiser.batches == [[0.0], [1.0]]


@pytest.mark.parametrize("lanes", [1, 2])
def test_tasks_have_results_and_failures_of_their_own(lanes: int, engine: Callable[..., Engine]) -> None:
    def asking() -> Steps:
        found = yield Task(lambda: 7)
        assert (yield Task(lambda: None)) is None
        with pytest.raises(KeyError):
            yield Task(lambda: {}["none"])
        return found

    def failing() -> Steps:
        yield Task(lambda: 1 // 0)

    running = engine(lanes=lanes)
    broken, good = running.submit([failing]), running.submit([asking])
    assert good.result.result(WAIT_S) == [7]
    with pytest.raises(ZeroDivisionError):
        broken.result.result(WAIT_S)


def test_a_task_holds_up_nobody(engine: Callable[..., Engine]) -> None:
    gate, begun = threading.Event(), threading.Event()

    def decode() -> bool:
        begun.set()
        return gate.wait(WAIT_S)

    def decoding() -> Steps:
        return (yield Task(decode))

    running = engine(lanes=2)
    slow = running.submit([decoding])
    assert begun.wait(WAIT_S)
    np.testing.assert_array_equal(running.submit([image(1, 5)]).result.result(WAIT_S)[0], alone(image(1, 5)))
    assert not slow.result.done()
    gate.set()
    assert slow.result.result(WAIT_S) == [True]


def test_what_is_left_while_a_lane_runs_it_ends_there(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    running = engine(max_batch=2, lanes=2)
    first = held(denoiser, running, image(0, 9))
    other = running.submit([image(1, 2)])
    assert denoiser.entered.acquire(timeout=WAIT_S)
    first.cancel()
    assert denoiser.gate is not None
    denoiser.gate.set()
    np.testing.assert_array_equal(other.result.result(WAIT_S)[0], alone(image(1, 2)))
    with pytest.raises(CancelledError):
        first.result.result(WAIT_S)
    running.close()
    assert not any(8.0 in batch for batch in denoiser.batches)  # it was not drawn to its end


@pytest.mark.parametrize("grace_s", [0.0, WAIT_S])
def test_lanes_end_with_the_engine(grace_s: float, engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    running = engine(lanes=2)
    ticket = held(denoiser, running, image(0, 3), image(1, 3), image(2, 3))
    running.drain(grace_s)
    assert denoiser.gate is not None
    denoiser.gate.set()
    running.close(grace_s)
    if grace_s:
        assert len(ticket.result.result(WAIT_S)) == 3
    else:
        with pytest.raises(Stopped):
            ticket.result.result(WAIT_S)
    assert not any(thread.name.startswith("hqc-lane") for thread in threading.enumerate())


def test_an_image_that_fails_fails_its_request_alone(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    running = engine(max_batch=4)
    first = held(denoiser, running, image(0, 4))
    broken = running.submit([image(1, 9, fails_at=2), image(2, 9)])
    unbegun = running.submit([image(3, 2, fails_at=0)])
    assert denoiser.gate is not None
    denoiser.gate.set()
    np.testing.assert_array_equal(first.result.result(WAIT_S)[0], alone(image(0, 4)))
    with pytest.raises(ValueError, match="image 1"):
        broken.result.result(WAIT_S)
    with pytest.raises(ValueError, match="image 3"):
        unbegun.result.result(WAIT_S)
    running.submit([image(5, 1)]).result.result(WAIT_S)  # goes on
    assert not any(t > 7 for batch in denoiser.batches for t in batch)  # image 2 was not drawn to its end


def test_a_call_that_fails_for_all_is_made_again_for_each(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    def poison() -> Steps:
        yield Call({"x": np.array([np.nan]), "t": 0.0}, 1)

    running = engine(max_batch=4)
    first = held(denoiser, running, image(0, 3))
    broken = running.submit([poison])
    assert denoiser.gate is not None
    denoiser.gate.set()
    np.testing.assert_array_equal(first.result.result(WAIT_S)[0], alone(image(0, 3)))
    with pytest.raises(FloatingPointError):
        broken.result.result(WAIT_S)


def test_a_request_that_is_left_ends_at_the_next_step(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    left: list[int] = []

    def endless() -> Steps:
        try:
            while True:
                yield Call({"x": np.zeros(1), "t": 0.0}, 1)
        finally:
            left.append(len(denoiser.batches))

    running = engine(max_batch=1)
    first = held(denoiser, running, endless)
    waiting = running.submit([image(1, 1)])
    first.cancel()
    waiting.cancel()
    last = running.submit([image(2, 1)])
    assert denoiser.gate is not None
    denoiser.gate.set()
    last.result.result(WAIT_S)
    assert left == [1]
    assert denoiser.batches == [[0.0], [2.0]]  # what was left while it waited was never begun
    for ticket in (first, waiting):
        with pytest.raises(CancelledError):
            ticket.result.result(WAIT_S)


def test_time_limit_holds_in_the_line_and_under_way(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    running = engine(max_batch=1)
    first = held(denoiser, running, image(0, 2))
    late = running.submit([image(1, 1)], time_limit_s=0.01)
    time.sleep(0.02)
    assert denoiser.gate is not None
    denoiser.gate.set()
    first.result.result(WAIT_S)
    with pytest.raises(TimeUp):
        late.result.result(WAIT_S)
    with pytest.raises(TimeUp):
        running.submit([image(2, 10**9)], time_limit_s=0.02).result.result(WAIT_S)


def test_the_line_has_an_end(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    running = engine(max_batch=2, max_queue=1)
    held(denoiser, running, image(0, 1), image(1, 1), image(2, 1))
    assert running.waiting == 0  # its third image waits, the request does not
    running.submit([image(3, 1)])
    assert running.waiting == 1
    with pytest.raises(Busy, match="1 requests are waiting already; try again in 1 s"):
        running.submit([image(4, 1)])


def test_without_a_line_there_is_room_in_the_batch(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    running = engine(max_batch=2, max_queue=0)
    held(denoiser, running, image(0, 1))
    running.submit([image(1, 1)])
    with pytest.raises(Busy):
        running.submit([image(2, 1)])


def test_closing_lets_what_runs_end_and_refuses_what_waits(engine: Callable[..., Engine], denoiser: Denoiser) -> None:
    running = engine(max_batch=1)
    first, waiting = held(denoiser, running, image(0, 3)), running.submit([image(1, 1)])
    running.drain(WAIT_S)
    assert not running.alive
    with pytest.raises(Stopped):
        running.submit([image(2, 1)])
    assert denoiser.gate is not None
    denoiser.gate.set()
    np.testing.assert_array_equal(first.result.result(WAIT_S)[0], alone(image(0, 3)))
    with pytest.raises(Stopped):
        waiting.result.result(WAIT_S)


def test_closing_without_grace_ends_what_runs(engine: Callable[..., Engine]) -> None:
    running = engine()
    ticket = running.submit([image(0, 10**9)])
    running.close()
    with pytest.raises(Stopped):
        ticket.result.result(WAIT_S)


def test_a_fault_of_the_engine_ends_all_that_wait_for_it(denoiser: Denoiser) -> None:
    class Faulty:
        def step(self, *_: Any) -> None:
            raise ZeroDivisionError

        def ended(self, *_: Any) -> None: ...

    running = Engine(denoiser, max_batch=1, observer=Faulty())
    denoiser.gate = threading.Event()
    tickets = [running.submit([image(n, 2)]) for n in range(2)]
    denoiser.gate.set()
    for ticket in tickets:
        with pytest.raises(ZeroDivisionError):
            ticket.result.result(WAIT_S)
    with pytest.raises(Stopped):
        running.submit([image(0, 1)])


def test_the_observer_is_told_of_steps_and_ends(denoiser: Denoiser) -> None:
    class Observer:
        def __init__(self) -> None:
            self.steps: list[tuple[int, int]] = []
            self.ends: list[tuple[Ticket, BaseException | None]] = []

        def step(self, images: int, rows: int, seconds: float) -> None:
            assert seconds >= 0
            self.steps.append((images, rows))

        def ended(self, ticket: Ticket, error: BaseException | None) -> None:
            self.ends.append((ticket, error))

    observer = Observer()
    running = Engine(denoiser, max_batch=4, observer=observer, policy="continuous")
    ticket = running.submit([image(0, 2), image(1, 1)])
    ticket.result.result(WAIT_S)
    running.close()
    assert observer.steps == [(2, 4), (1, 2)]
    assert observer.ends == [(ticket, None)]
    assert ticket.queue_s >= 0
    assert ticket.run_s > 0
