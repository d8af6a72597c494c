"""The searches for scales and zero points against loops in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hqc.calibration.searches import AsymmetricSearch, Search, SymmetricSearch, activation_search


def _values(seed: int, shift: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5000, generator=generator)
    return x * (1 + 5 * (torch.rand(5000, generator=generator) > 0.97)) + shift


def _added(search: Search, *calls: Tensor) -> Search:
    for x in calls:
        search.add(x, float(x.min()), float(x.max()))
    return search


def _error(x: np.ndarray, scale: float, low: int, high: int, power: float) -> float:
    codes = np.clip(np.round(x / scale), low, high)
    return float((np.abs(codes * scale - x) ** power).sum())


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("shift", [0.0, 3.0, -20.0])
def test_asymmetric_ranges_are_the_best_of_the_shrunk_ones(power: float, shift: float) -> None:
    x = _values(1, shift)
    found = _added(AsymmetricSearch(15, 80, power), x)
    values = x.numpy().astype(np.float64)
    least, largest = min(values.min(), 0), max(values.max(), 0)
    zero = round(-least / (largest - least) * 15)
    scales = [(largest - least) * k / 80 / 15 for k in range(1, 81)]
    errors = [_error(values, s, -zero, 15 - zero, power) for s in scales]
    assert found.zero == zero
    assert 0 <= found.zero <= 15
    # The best of the loop, or one whose error differs by float32 rounding alone.
    assert _error(values, found.scale, -zero, 15 - zero, power) <= min(errors) * (1 + 1e-4)
    assert found.scale == pytest.approx(scales[int(np.argmin(errors))], rel=0.03)


def test_symmetric_ranges_are_the_best_too() -> None:
    x = _values(2, 0.0)
    values, top = x.numpy().astype(np.float64), float(x.abs().max())
    scales = [top / 7 * r for r in np.linspace(1 / 60, 1.05, 60)]
    errors = [_error(values, s, -7, 7, 2.4) for s in scales]
    found = _added(SymmetricSearch(-7, 7, 60, 2.4), x).scale
    assert found == pytest.approx(scales[int(np.argmin(errors))], rel=1e-4)
    assert min(errors) < 0.9 * errors[-4]  # searching pays: the whole range is worse


@pytest.mark.parametrize(("symmetric", "like"), [(True, SymmetricSearch(-7, 7, 60)), (False, AsymmetricSearch(15, 60))])
def test_search_of_a_range(symmetric: bool, like: Search) -> None:
    x = _values(2, 0.5)
    found, expected = _added(activation_search(4, symmetric, 60), x), _added(like, x)
    assert (found.scale, found.zero) == (expected.scale, expected.zero)


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_later_calls_may_be_wider(power: float) -> None:
    """Nearly what one call with all values finds: the wider candidates take the earlier ones as uniformly rounded."""
    small, large = _values(3, 1.0), 4 * _values(4, 2.0)
    one = _added(AsymmetricSearch(15, 80, power), torch.cat([small, large]))
    two = _added(AsymmetricSearch(15, 80, power), small, large)
    values = torch.cat([small, large]).numpy().astype(np.float64)
    errors = [_error(values, s.scale, -int(s.zero), 15 - int(s.zero), power) for s in (one, two)]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("search", [SymmetricSearch(-7, 7, 10), AsymmetricSearch(15, 10)], ids=["symmetric", "other"])
def test_zeros_take_any_scale(search: Search) -> None:
    zeros = torch.zeros(100)
    _added(search, zeros)
    assert search.scale > 0
    assert search.zero == 0
    _added(search, _values(5, 0.0), zeros)
    assert search.scale > 0
