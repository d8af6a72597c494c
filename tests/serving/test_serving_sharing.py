"""How many images share calls: as many as pay, whatever a call costs; times are those of a clock that tests move on."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import Request, latencies, poisson

from hqc.serving.engine import Engine
from hqc.serving.sharing import Cost, Sharing, StepTimes, pays
from hqc.serving.tickets import Call, Steps, Task

WAIT_S = 20
TWO_ROWS, ONE_ROW, DECODE = Call({}, 2), Call({}, 1), Task(lambda: None)


def call_of(fixed: float) -> Callable[[int], float]:
    """Seconds of a call of so many rows; one of two rows takes one second, `fixed` of it for the call itself."""
    return lambda rows: fixed + (1 - fixed) * rows / 2


class Clock:
    """Seconds that a test says have gone by."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def stepped(
    sharing: Sharing, clock: Clock, images: list[Hashable], seconds: float, call: Call | Task = TWO_ROWS
) -> None:
    """A step of some images in one call."""
    clock.now += seconds
    for image in images:
        sharing.wants(image, call)


def measured(cost: Cost, *, lanes: int = 1, images: int = 2) -> tuple[Sharing, Clock]:
    """After three steps of one image, and three of so many, two rows each."""
    clock = Clock()
    sharing = Sharing(lanes, clock)
    for count in (1, images):
        beside: list[Hashable] = list(range(count))
        stepped(sharing, clock, beside, 0)
        for _ in range(4):  # the first is of what has just changed
            stepped(sharing, clock, beside, cost.of(max(1, 2 * count / lanes)))
    for image in range(images):
        sharing.left(image)
    return sharing, clock


# ---- at whatever load and cost, on the engine ------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.5, 0.9])
@pytest.mark.parametrize("fixed", [0.0, -0.1], ids=["a row costs the same in any batch", "more in a larger one"])
def test_where_sharing_brings_nothing_images_are_drawn_one_after_the_other(fixed: float, load: float) -> None:
    coming, cost = poisson(load / 20, 400, seed=1), call_of(fixed)
    adaptive, single, static, continuous = (
        latencies(policy, coming, cost) for policy in ("adaptive", "single", "static", "continuous")
    )
    # Every thousand steps two images share, to see whether that still holds.
    assert adaptive.mean() <= 1.04 * single.mean()
    for percent in (50, 95):
        assert np.percentile(adaptive, percent) <= np.percentile(static, percent)
        assert np.percentile(adaptive, percent) <= np.percentile(continuous, percent)


@pytest.mark.parametrize("load", [0.5, 0.9, 1.3])
@pytest.mark.parametrize("fixed", [0.5, 0.8])
def test_where_sharing_pays_images_share(fixed: float, load: float) -> None:
    coming, cost = poisson(load / 20, 400, seed=2), call_of(fixed)
    adaptive, static, continuous = (latencies(policy, coming, cost) for policy in ("adaptive", "static", "continuous"))
    # The first images are drawn alone, to be measured.
    assert adaptive.mean() <= 1.02 * continuous.mean()
    for percent in (50, 95):
        assert np.percentile(adaptive, percent) <= np.percentile(static, percent)


@pytest.mark.parametrize("load", [0.5, 0.9])
@pytest.mark.parametrize("fixed", [0.1, 0.3])
def test_between_the_two_nobody_waits_longer_than_with_the_others(fixed: float, load: float) -> None:
    coming, cost = poisson(load / 20, 400, seed=3), call_of(fixed)
    adaptive, *others = (latencies(policy, coming, cost) for policy in ("adaptive", "single", "static", "continuous"))
    # The rule is of averages, and of a load that it does not know: close to the best of three, each of which is far
    # from it at some load or cost (up to 2 times).
    assert adaptive.mean() <= 1.05 * min(other.mean() for other in others)


@pytest.mark.parametrize(("fixed", "best"), [(-0.1, "single"), (0.6, "continuous")])
def test_requests_with_and_without_guidance_together(fixed: float, best: Any) -> None:
    coming, cost = poisson(0.8 / 15, 400, seed=4, rows=(1, 2)), call_of(fixed)
    assert latencies("adaptive", coming, cost).mean() <= 1.05 * latencies(best, coming, cost).mean()


def test_a_line_as_long_as_the_batch_is_drawn_at_the_best_speed() -> None:
    coming, cost = [Request(0.0, 20) for _ in range(64)], call_of(0.2)
    # 8 s less for every image alone, at first: three steps alone, three of two.
    assert latencies("adaptive", coming, cost).max() <= 1.03 * latencies("continuous", coming, cost).max()


def test_images_begin_in_the_order_of_their_requests() -> None:
    coming = [Request(index / 10, 5) for index in range(30)]
    found = latencies("adaptive", coming, call_of(0.0))
    ended = found + [request.at_s for request in coming]
    # All have as many steps: whoever came first is done first.
    assert (np.diff(ended) >= 0).all()


# ---- the rule --------------------------------------------------------------------------------------------------------


@given(fixed=st.floats(0.01, 10), each=st.floats(0.01, 10), sharing=st.integers(1, 20), there=st.integers(1, 64))
def test_pays_is_the_rule_of_a_line(fixed: float, each: float, sharing: int, there: int) -> None:
    gain, loss = there**2 * fixed, sharing * (sharing + 1) * each
    if abs(gain - loss) > 1e-6 * (gain + loss):  # float rounding decides between equals
        assert pays(lambda images: fixed + each * images, sharing, there) == (gain > loss)


@given(fixed=st.floats(-5, 0), each=st.floats(0.01, 10), sharing=st.integers(1, 20), there=st.integers(1, 64))
def test_nothing_pays_where_calls_cost_nothing_of_themselves(
    fixed: float, each: float, sharing: int, there: int
) -> None:
    assert not pays(lambda images: fixed + each * images, sharing, there)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_the_line_through_steps() -> None:
    times = StepTimes()
    assert (times.cost(), times.least) == (None, None)
    for rows in (4.0, 2.0, 7.0):
        for _ in range(3):
            times.add(rows, 0.5 + 0.25 * rows, 0)
    found = times.cost()
    assert found is not None
    assert (found.fixed, found.each) == (pytest.approx(0.5), pytest.approx(0.25))
    assert times.least == 2


def test_two_steps_of_a_size_tell_nothing() -> None:
    times = StepTimes()
    for _ in range(3):
        times.add(1, 1.0, 0)
    for _ in range(2):
        times.add(2, 9.0, 0)
    assert times.cost() is None


def test_a_step_that_something_else_held_up_tells_nothing() -> None:
    times = StepTimes()
    for rows in (1, 2):
        for seconds in (1.0 * rows, 100.0, 1.0 * rows, 1.0 * rows):
            times.add(rows, seconds, 0)
    assert times.cost() == Cost(pytest.approx(0.0), pytest.approx(1.0))


def test_one_image_alone_then_two_are_measured_first() -> None:
    clock = Clock()
    sharing = Sharing(clock=clock)
    assert sharing.limit(8, 8) == 1
    stepped(sharing, clock, ["a"], 1)
    for _ in range(3):
        assert sharing.limit(8, 8) == 1
        stepped(sharing, clock, ["a"], 1)
    assert sharing.limit(8, 8) == 2
    stepped(sharing, clock, ["a", "b"], 1)
    for _ in range(2):
        stepped(sharing, clock, ["a", "b"], 1)
        assert sharing.cost is None or sharing.cost == Cost(1, 0)
    assert sharing.limit(8, 8) == 8


@pytest.mark.parametrize(
    ("cost", "there", "limit"),
    [
        (Cost(0, 1), 8, 1),
        (Cost(-1, 1), 64, 1),
        (Cost(1, 0), 2, 8),
        (Cost(1, 0), 0, 1),
        (Cost(0.4, 1), 2, 1),  # of two rows an image: n² · 0.4 > k(k+1) · 2
        (Cost(0.4, 1), 4, 2),
        (Cost(0.4, 1), 8, 4),
        (Cost(0.4, 1), 20, 8),
    ],
)
def test_limits(cost: Cost, there: int, limit: int) -> None:
    sharing, _ = measured(cost)
    assert sharing.cost is not None
    assert (sharing.cost.fixed, sharing.cost.each) == (
        pytest.approx(cost.fixed, abs=1e-9),
        pytest.approx(cost.each, abs=1e-9),
    )
    assert sharing.limit(there, 8) == limit


def test_images_of_one_row_have_a_lane_each_for_nothing() -> None:
    clock = Clock()
    sharing = Sharing(2, clock)
    stepped(sharing, clock, ["a"], 1, ONE_ROW)
    for _ in range(3):
        stepped(sharing, clock, ["a"], 1, ONE_ROW)
    assert sharing.limit(8, 8) == 3  # two of them tell no more than one does
    stepped(sharing, clock, ["a", "b", "c"], 1.5, ONE_ROW)
    for _ in range(3):
        stepped(sharing, clock, ["a", "b", "c"], 1.5, ONE_ROW)
    assert sharing.cost == Cost(pytest.approx(0), pytest.approx(1))
    assert sharing.limit(8, 8) == 2


def test_lanes_divide_rows() -> None:
    sharing, _ = measured(Cost(0.5, 1), lanes=2)
    assert sharing.cost == Cost(pytest.approx(0.5), pytest.approx(1))


def changed(sharing: Sharing, clock: Clock) -> None:
    clock.now += 50
    sharing.wants("c", TWO_ROWS)
    clock.now += 50
    stepped(sharing, clock, ["a", "b"], 0)


def left(sharing: Sharing, clock: Clock) -> None:
    clock.now += 100
    sharing.left("b")
    sharing.wants("a", TWO_ROWS)


def ended(sharing: Sharing, clock: Clock) -> None:
    sharing.wants("b", None)
    stepped(sharing, clock, ["a"], 100)


def decoded(sharing: Sharing, clock: Clock) -> None:
    sharing.wants("b", DECODE)
    stepped(sharing, clock, ["a"], 0)
    stepped(sharing, clock, ["a"], 100)
    stepped(sharing, clock, ["b"], 100)


@pytest.mark.parametrize("meanwhile", [changed, left, ended, decoded])
def test_only_steps_of_the_same_images_all_along_are_measured(meanwhile: Callable[[Sharing, Clock], None]) -> None:
    clock = Clock()
    sharing = Sharing(clock=clock)
    added: list[tuple[float, float]] = []
    sharing._times.add = lambda rows, seconds, now: added.append((rows, seconds))  # type: ignore[method-assign]
    stepped(sharing, clock, ["a", "b"], 0)
    stepped(sharing, clock, ["a", "b"], 3)
    stepped(sharing, clock, ["a", "b"], 2)
    meanwhile(sharing, clock)
    assert all(rows == 4 for rows, _ in added)
    assert {seconds for _, seconds in added} <= {0, 2, 3}  # "b" wants something else at once: a step of no time
    assert (4, 2) in added


@pytest.mark.parametrize(("seconds", "after"), [(0.1, 300), (1, 1000)])
def test_what_has_not_been_seen_for_long_is_measured_again(seconds: float, after: float) -> None:
    """Two that were slow beside each other for another reason are tried again, and share from then on.

    After five minutes and a thousand steps.
    """
    sharing, clock = measured(Cost(-1, 1))
    start = clock.now
    stepped(sharing, clock, ["a"], 0)
    while sharing.limit(8, 8) == 1:
        stepped(sharing, clock, ["a"], seconds)
    # A line is drawn at every sixteenth step.
    assert after <= clock.now - start <= after + 16 * seconds
    assert sharing.limit(8, 8) == 2
    for _ in range(4):
        stepped(sharing, clock, ["a", "b"], seconds)
    assert sharing.limit(8, 8) == 8


# ---- the engine ------------------------------------------------------------------------------------------------------


def test_an_image_whose_last_call_is_done_gives_its_place_to_the_next() -> None:
    decoding, gate = threading.Event(), threading.Event()

    def decode() -> bool:
        decoding.set()
        return gate.wait(WAIT_S)

    def drawn(last: bool) -> Callable[[], Steps]:
        def begin() -> Steps:
            yield TWO_ROWS
            return (yield Task(decode, last))

        return begin

    def short() -> Steps:
        yield TWO_ROWS
        return "done"

    engine = Engine(lambda calls, at_once: [None] * len(calls), lanes=2)
    try:
        engine.submit([drawn(last=True)])
        assert decoding.wait(WAIT_S)
        assert engine.submit([short]).result.result(WAIT_S) == ["done"]
        gate.set()
    finally:
        engine.close(WAIT_S)


def test_the_limit_is_told() -> None:
    for policy, limit in (("single", 1), ("static", 5), ("continuous", 5), ("adaptive", 1)):
        engine = Engine(lambda calls, at_once: [None] * len(calls), max_batch=5, policy=policy)  # type: ignore[arg-type]
        assert (engine.limit, engine.cost) == (limit, None)
