"""Quantisers against a numpy float32 table, their gradients against formulas written out, and one another bitwise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.bits import activation_range, weight_range
from hqc.ops import dequantize, fake_quantize, quantize

relaxed = settings(deadline=None, derandomize=True, max_examples=60)
BITS = range(2, 9)
RANGES = [pytest.param(*r(b), id=f"{n}{b}") for b in BITS for n, r in (("a", activation_range), ("w", weight_range))]


def oracle_codes(x: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    """clip(rint(x·(1/s))) in float32, every step rounded to float32; np.rint is half to even."""
    inverse = (np.float32(1) / scale.astype(np.float32)).reshape(-1, *[1] * (x.ndim - 1))
    return np.clip(np.rint(x.astype(np.float32) * inverse), low, high)


def oracle(x: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    codes = oracle_codes(x, scale, low, high).astype(np.float32)
    return codes * scale.astype(np.float32).reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_the_representable_values_are_exactly_the_codes(low: int, high: int) -> None:
    # Power-of-two scale: every product is exact, so the table has no tolerance.
    sweep = torch.linspace(low - 3, high + 3, 20_001)[None] * 0.25
    values = fake_quantize(sweep, torch.tensor([0.25]), low, high).unique()
    assert values.tolist() == [0.25 * code for code in range(low, high + 1)]
    codes = quantize(sweep, torch.tensor([0.25]), low, high)
    assert codes.dtype == torch.int8
    assert codes.unique().tolist() == list(range(low, high + 1))


@pytest.mark.parametrize("bits", BITS)
def test_ranges_have_the_documented_ends(bits: int) -> None:
    table = {2: 1, 3: 3, 4: 7, 5: 15, 6: 31, 7: 63, 8: 127}
    assert activation_range(bits) == (-table[bits], table[bits])
    assert weight_range(bits) == (-table[bits] - 1, table[bits])


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_ties_go_to_the_even_code(low: int, high: int) -> None:
    halves = torch.arange(low, high, dtype=torch.float32) + 0.5
    expected = [min(max(2 * round((h - 0.5 + 0.5) / 2), low), high) for h in halves.tolist()]
    by_definition = [k if k % 2 == 0 else k + 1 for k in range(low, high)]
    assert expected == [min(k, high) for k in by_definition]
    assert quantize(halves[None], torch.ones(1), low, high)[0].tolist() == [min(k, high) for k in by_definition]
    assert fake_quantize(halves[None], torch.ones(1), low, high)[0].tolist() == [min(k, high) for k in by_definition]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_beyond_the_range_it_saturates(low: int, high: int) -> None:
    far = torch.tensor([[-1e30, low - 1.0, high + 1.0, 1e30]])
    assert fake_quantize(far, torch.ones(1), low, high).tolist() == [[low, low, high, high]]
    assert quantize(far, torch.ones(1), low, high).tolist() == [[low, low, high, high]]


@relaxed
@given(
    bits=st.sampled_from(BITS),
    weight=st.booleans(),
    rows=st.integers(1, 4),
    rank=st.integers(2, 4),
    log_scale=st.floats(-12, 4),
    seed=st.integers(0, 2**31),
)
def test_against_numpy_bitwise(bits: int, weight: bool, rows: int, rank: int, log_scale: float, seed: int) -> None:
    low, high = (weight_range if weight else activation_range)(bits)
    rng = np.random.default_rng(seed)
    scale = (2.0**log_scale * rng.uniform(0.5, 2, rows)).astype(np.float32)
    x = (rng.standard_normal((rows, *[3] * (rank - 1))) * high * 2.0**log_scale).astype(np.float32)
    # Half of the values sit as near to a tie as float32 allows.
    ties = ((rng.integers(low - 1, high + 1, x.shape) + 0.5) * scale.reshape(-1, *[1] * (rank - 1))).astype(np.float32)
    x = np.where(rng.random(x.shape) < 0.5, ties, x)
    tx, ts = torch.from_numpy(x), torch.from_numpy(scale)
    assert np.array_equal(quantize(tx, ts, low, high).numpy(), oracle_codes(x, scale, low, high))
    assert np.array_equal(fake_quantize(tx, ts, low, high).numpy(), oracle(x, scale, low, high))


@relaxed
@given(bits=st.sampled_from(BITS), shape=st.sampled_from([(2, 3), (3, 4, 5), (2, 8, 3, 3)]), seed=st.integers(0, 2**31))
def test_quantize_then_dequantize_is_fake_quantize_bitwise(bits: int, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = activation_range(bits)
    x = torch.randn(shape, generator=generator) * 3
    scale = torch.rand(shape[0], generator=generator) + 0.01
    pair = dequantize(quantize(x, scale, low, high), scale)
    assert pair.dtype == torch.float32
    # -0.0 and 0.0 count as equal: codes have no sign of zero.
    assert torch.equal(pair, fake_quantize(x, scale, low, high))
    assert not torch.equal(pair, x)


@relaxed
@given(bits=st.sampled_from(BITS), exponent=st.integers(-10, 3), seed=st.integers(0, 2**31))
def test_quantising_twice_changes_nothing(bits: int, exponent: int, seed: int) -> None:
    low, high = weight_range(bits)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent * high
    scale = 2.0**exponent * torch.tensor([1.0, 0.7, 1.3])
    once = fake_quantize(x, scale, low, high)
    # s·code·(1/s) is within 2^-22 of the code, far from a tie: the same code again.
    assert torch.equal(fake_quantize(once, scale, low, high), once)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_follow_the_formula(bits: int) -> None:
    low, high = activation_range(bits)
    generator = torch.Generator().manual_seed(bits)
    x = (torch.randn(3, 40, generator=generator) * high).requires_grad_()
    scale = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    upstream = torch.randn(3, 40, generator=generator)
    fake_quantize(x, scale, low, high).backward(upstream)

    grad_x, grad_scale, outside = np.zeros((3, 40)), np.zeros(3), 0
    for i in range(3):
        for j in range(40):
            level, g = x[i, j].item() / scale[i].item(), upstream[i, j].item()
            if level > high + 0.5 or level < low - 0.5:
                grad_scale[i] += g * (high if level > 0 else low)
                outside += 1
            else:
                grad_x[i, j] = g
                grad_scale[i] += g * (min(max(round(level), low), high) - level)
    assert 0 < outside < 120, "the case must have values inside and outside"
    assert np.array_equal(x.grad.numpy(), grad_x.astype(np.float32))
    # Sums of 40 float32 products of magnitude ≤ |g|·high: 40·2^-24·|g|·high, about 3e-4 at 8 bits, relative to high.
    assert np.abs(scale.grad.numpy() - grad_scale).max() <= 40 * 2**-24 * 4 * high


def test_the_scale_gradient_equals_a_finite_difference() -> None:
    # Away from rounding boundaries x̂ = s·code is linear in s: the total derivative at fixed codes is Σ g·code, and the
    # estimator's is Σ g·(code - x/s). They differ by the straight-through term, which must be exactly -Σ g·x/s.
    x = torch.tensor([[0.3, -1.2, 2.1, 40.0, -40.0]], dtype=torch.float32)
    scale = torch.tensor([0.5], requires_grad=True)
    fake_quantize(x, scale, -7, 7).sum().backward()
    codes = quantize(x, scale.detach(), -7, 7).float()
    inside = x.abs() < 3.75
    expected = codes.sum() - (x / 0.5)[inside].sum()
    assert scale.grad.item() == pytest.approx(expected.item(), abs=1e-6)  # five float32 terms below 10


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 3, 2, 2)])
def test_the_scale_belongs_to_the_first_axis(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.6)
    out = fake_quantize(x, torch.tensor([0.5, 1.0, 2.0, 0.2]), -7, 7)
    for row, value in enumerate([0.5, 1.0, 0.0, 0.6]):
        assert torch.allclose(out[row], torch.full(shape[1:], value), rtol=1e-6, atol=0)  # 3·0.2 in float32
