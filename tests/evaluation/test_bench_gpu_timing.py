"""Turns, rotation and spread of what is timed on a GPU; the card itself is a stand-in."""

from hqc.evaluation.bench.gpu_timing import Measured, Rotation, interleaved, quartiles


def test_every_contender_leads_and_the_first_round_is_dropped() -> None:
    order: list[str] = []
    replays = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    ticks = iter(range(1000))

    def clock(replay) -> float:
        replay()
        return 100.0 + next(ticks)

    spun: list[float] = []
    found = interleaved(replays, {"a": 1, "b": 10, "c": 2}, rounds=3, clock=clock, spin=spun.append)
    assert "".join(order) == "abcbcacababc"
    assert found["a"] == quartiles([105.0, 107.0, 109.0])
    assert found["b"] == quartiles([10.3, 10.8, 11.0])
    assert spun[0] > 0.1
    assert len(spun) == 1 + len(order)


def test_copies_are_more_than_the_cache_holds() -> None:
    cache = 50 * 2**20
    for size in (10_000, 3_000_000, 9_000_000, 200_000_000):
        rotation = Rotation.over(size, cache)
        assert rotation.calls >= 8
        assert 2 <= rotation.copies <= rotation.calls <= 24
        assert rotation.copies * size >= 2 * cache or rotation.copies == 24


def test_spread_as_json() -> None:
    assert Measured(2.0, 1.5, 3.0).to_dict() == {"us": 2.0, "us_low": 1.5, "us_high": 3.0}
