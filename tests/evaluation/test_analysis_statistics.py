"""Every number of an analysis against numpy and scipy in double precision."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hqc.evaluation.analysis_statistics import Moments, best_scale, channel_rows, sample_rows, snr_db
from hqc.ops import hadamard

# Sums run in double precision over float32 values: what is left is the rounding of x - mean.
RELATIVE = 1e-5


def heavy_tailed(*shape: int, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) ** 3 + mean


@pytest.mark.parametrize("mean", [0.0, 3.0, -100.0])
def test_moments_are_numpys(mean: float) -> None:
    x = heavy_tailed(7, 33, mean=mean)
    wide = x.double().numpy().reshape(-1)
    found = Moments.of(x)
    assert found.count == wide.size
    assert found.rms == pytest.approx(math.sqrt(np.mean(wide**2)), rel=RELATIVE)
    assert found.max_over_rms == pytest.approx(np.abs(wide).max() / math.sqrt(np.mean(wide**2)), rel=RELATIVE)
    assert found.kurtosis == pytest.approx(stats.kurtosis(wide, fisher=False), rel=RELATIVE)


def test_kurtosis_is_the_plain_one() -> None:
    """3 for normal values, 1.8 for uniform ones, within the noise of 2·10⁵ draws (σ ≈ √(24/n) ≈ 0.011)."""
    generator = torch.Generator().manual_seed(1)
    assert Moments.of(torch.randn(200_000, generator=generator)).kurtosis == pytest.approx(3.0, abs=0.05)
    assert Moments.of(torch.rand(200_000, generator=generator)).kurtosis == pytest.approx(1.8, abs=0.02)


@settings(deadline=None, max_examples=60)
@given(cuts=st.lists(st.integers(0, 300), max_size=5), mean=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_streams_merge_to_the_moments_of_the_whole(cuts: list[int], mean: float, seed: int) -> None:
    x = heavy_tailed(300, seed=seed, mean=mean)
    merged = Moments()
    for start, end in pairwise([0, *sorted(cuts), 300]):
        merged = merged.merge(Moments.of(x[start:end]))
    whole = Moments.of(x)
    assert merged.count == 300
    assert merged.top == whole.top
    for name in ("mean", "m2", "m4", "rms", "kurtosis"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-4, abs=1e-6), name


def test_what_is_undefined_is_none() -> None:
    zeros, equal = Moments.of(torch.zeros(8)), Moments.of(torch.full((8,), 2.0))
    assert zeros.max_over_rms is None
    assert zeros.kurtosis is None
    assert equal.kurtosis is None
    assert equal.max_over_rms == 1.0
    assert Moments().merge(Moments()) == Moments()
    assert snr_db(torch.zeros(3), torch.ones(3)) is None
    assert snr_db(torch.ones(3), torch.ones(3)) is None


def test_snr_is_ten_log_ten_of_the_energies() -> None:
    x = heavy_tailed(100)
    found = torch.round(x)
    wide, error = x.double().numpy(), (x - found).double().numpy()
    assert snr_db(x, found) == pytest.approx(10 * np.log10((wide**2).sum() / (error**2).sum()), rel=1e-6)
    assert snr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])) == pytest.approx(20.0)  # 25/0.25


@pytest.mark.parametrize("qmax", [1, 3, 7, 127])
def test_the_best_scale_is_the_best_of_all_candidates(qmax: int) -> None:
    x = heavy_tailed(500)
    top = float(x.abs().max())
    scales = np.float32(top / qmax) * np.linspace(1 / 60, 1.05, 60, dtype=np.float32)
    wide = x.double().numpy()
    errors = [((np.clip(np.round(wide / s), -qmax, qmax) * s - wide) ** 2).sum() for s in scales.astype(float)]
    assert best_scale(x, top, -qmax, qmax) == pytest.approx(scales[int(np.argmin(errors))], rel=1e-5)
    assert best_scale(torch.zeros(4), 0.0, -qmax, qmax) == 1.0


@pytest.mark.parametrize(("shape", "axis"), [((2, 32, 5, 3), 1), ((2, 7, 32), -1), ((6, 32), -1)])
def test_sampled_rows_are_whole_channel_vectors_that_can_be_rotated(shape: tuple[int, ...], axis: int) -> None:
    x = heavy_tailed(*shape)
    rows = channel_rows(x, axis)
    assert rows.shape == (x.numel() // 32, 32)
    wanted = channel_rows(hadamard(x, 32, axis), axis)
    torch.testing.assert_close(hadamard(rows.contiguous(), 32, -1), wanted, rtol=0, atol=1e-5)  # float32 rounding


@given(rows=st.integers(1, 500), channels=st.integers(1, 64), values=st.integers(1, 4096))
def test_the_sample_is_bounded_and_spread(rows: int, channels: int, values: int) -> None:
    x = torch.arange(rows).view(-1, 1).expand(rows, channels)
    found = sample_rows(x, values)
    assert 1 <= len(found) <= rows
    wanted = max(1, values // channels)
    assert len(found) <= 2 * wanted + 1 or len(found) == rows <= wanted
    steps = set(found[:, 0].diff().tolist())
    assert len(steps) <= 1
