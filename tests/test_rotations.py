"""Kinds and orders of rotations, and which order fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.rotations import KINDS, ORDERS, Rotation, block_size

relaxed = settings(deadline=None, derandomize=True, max_examples=40)


@relaxed
@given(channels=st.integers(1, 4096), wanted=st.sampled_from((8, 16, 32, 64, 128)))
def test_the_block_is_the_largest_power_of_two_that_divides(channels: int, wanted: int) -> None:
    fitting = [b for b in (8, 16, 32, 64, 128) if b <= wanted and channels % b == 0]
    assert block_size(channels, wanted) == max(fitting, default=0)


@pytest.mark.parametrize(
    ("channels", "wanted", "order"),
    [(1280, 256, 256), (320, 256, 64), (96, 256, 32), (48, 256, 16), (24, 256, 0), (512, 64, 64), (512, 32, 32)],
)
def test_regular_orders_fall_back_to_the_next_that_divides(channels: int, wanted: int, order: int) -> None:
    assert block_size(channels, wanted, "regular") == order


def test_every_order_is_a_power_of_two_and_ascends() -> None:
    assert KINDS == ("sylvester", "regular")
    for orders in ORDERS.values():
        assert list(orders) == sorted(orders)
        assert all(order & (order - 1) == 0 for order in orders)


def test_names_and_arguments() -> None:
    assert [str(r) for r in (Rotation(32), Rotation(64, regular=True))] == ["H32", "regular H64"]
    assert (Rotation(32).kind, Rotation(32).flag) == ("sylvester", ())
    assert (Rotation(32, True).kind, Rotation(32, True).flag) == ("regular", (True,))
