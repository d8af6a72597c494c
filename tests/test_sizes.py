"""Sizes as the command line and Python take them."""

import pytest

from hqc.sizes import as_size, sides, size_text


@pytest.mark.parametrize(
    ("given", "size"),
    [
        *[(64, 64), ("64", 64), ("64x96", (64, 96)), ("64X96", (64, 96)), ("64×96", (64, 96)), ("8x8", 8)],
        *[((64, 96), (64, 96)), ([64, 64], 64), ((9, 13), (9, 13)), (4096, 4096)],
    ],
)
def test_a_size(given: object, size: object) -> None:
    assert as_size(given) == size
    assert as_size(size_text(as_size(given))) == size


@pytest.mark.parametrize(
    "given",
    [
        *("", "x", "8x", "x8", "8x8x8", "8,8", "-8", "8.0", "eight", "٨", "1", "4097", "8 8"),
        *(1, 0, -8, 8.0, True, (), (8, 1), (8, 8, 8), (8, "8"), None),
    ],
)
def test_no_size(given: object) -> None:
    with pytest.raises(ValueError, match="expected a side such as 64, or height and width such as 64x96, of 2 to 4096"):
        as_size(given)


def test_sides() -> None:
    assert sides(8) == (8, 8)
    assert sides([8, 12]) == (8, 12)
