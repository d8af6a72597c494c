"""Quantisers with tensor bounds: the textbook form with its zero point, numpy, symmetric ones, finite differences."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.bits import activation_range, asymmetric_top, weight_range
from hqc.ops import dequantize, fake_quantize, fake_quantize_bounded, quantize_bounded, round_ste
from hqc.ops.bounded import FakeQuantizeBounded
from hqc.ops.straight_through import RoundSte

relaxed = settings(deadline=None, derandomize=True, max_examples=60)
BITS = range(2, 8)
Quantise = Callable[..., torch.Tensor]
BOTH = pytest.mark.parametrize("quantise", [fake_quantize_bounded, FakeQuantizeBounded.apply], ids=["op", "direct"])


def drawn(bits: int, rows: int, rank: int, log_scale: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, scales and zero points; half of the values sit as near to a tie as float32 allows, many lie outside."""
    rng = np.random.default_rng(seed)
    top = asymmetric_top(bits)
    scale = (2.0**log_scale * rng.uniform(0.5, 2, rows)).astype(np.float32)
    zero = rng.integers(0, top + 1, rows).astype(np.float32)
    broadcast = (-1, *[1] * (rank - 1))
    x = rng.standard_normal((rows, *[3] * (rank - 1))) * top * 2.0**log_scale
    ties = (rng.integers(-top - 1, top + 1, x.shape) + 0.5) * scale.reshape(broadcast)
    return np.where(rng.random(x.shape) < 0.5, ties, x).astype(np.float32), scale, zero


def textbook(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """(q, x̂) with q = clip(round(x/s) + z, 0, top), x̂ = s·(q - z), every step in float32."""
    s, z = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in (scale, zero))
    q = np.clip(np.rint(x * (np.float32(1) / s)) + z, 0, top)
    return q, (q - z).astype(np.float32) * s


@relaxed
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 4),
    rank=st.integers(2, 4),
    log_scale=st.floats(-12, 4),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_textbook_form_bitwise(bits: int, rows: int, rank: int, log_scale: float, seed: int) -> None:
    top = asymmetric_top(bits)
    x, scale, zero = drawn(bits, rows, rank, log_scale, seed)
    q, real = textbook(x, scale, zero, top)
    args = tuple(torch.from_numpy(v) for v in (x, scale, -zero, top - zero))
    assert np.array_equal(fake_quantize_bounded(*args).numpy(), real)
    codes = quantize_bounded(*args)
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.numpy(), q - zero.reshape(-1, *[1] * (rank - 1)))
    # -0.0 and 0.0 count as equal: codes have no sign of zero.
    assert torch.equal(dequantize(codes, args[1]), fake_quantize_bounded(*args))


@relaxed
@given(bits=st.sampled_from(range(2, 9)), weight=st.booleans(), seed=st.integers(0, 2**31))
def test_equal_bounds_for_all_are_the_symmetric_quantiser_bitwise(bits: int, weight: bool, seed: int) -> None:
    low, high = (weight_range if weight else activation_range)(bits)
    generator = torch.Generator().manual_seed(seed)
    x, scale = torch.randn(3, 4, 5, generator=generator) * high, torch.rand(3, generator=generator) + 0.5
    bounds = torch.full((3,), float(low)), torch.full((3,), float(high))
    a, b = (t.clone().requires_grad_() for t in (x, x))
    p, q = (t.clone().requires_grad_() for t in (scale, scale))
    upstream = torch.randn(x.shape, generator=generator)
    plain, bounded = fake_quantize(a, p, low, high), fake_quantize_bounded(b, q, *bounds)
    assert torch.equal(plain, bounded)
    plain.backward(upstream)
    bounded.backward(upstream)
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("bits", BITS)
def test_zero_is_code_zero_whatever_the_zero_point(bits: int) -> None:
    top = asymmetric_top(bits)
    zero = torch.arange(top + 1, dtype=torch.float32)
    x = torch.zeros(top + 1, 3)
    scale = torch.full((top + 1,), 0.3)
    assert not quantize_bounded(x, scale, -zero, top - zero).any()
    assert not fake_quantize_bounded(x, scale, -zero, top - zero).any()


@pytest.mark.parametrize("bits", BITS)
def test_every_row_has_its_own_codes(bits: int) -> None:
    top = asymmetric_top(bits)
    zero = torch.tensor([0.0, 1.0, float(top)])
    sweep = torch.linspace(-2 * top, 2 * top, 4001).expand(3, -1).contiguous()
    codes = quantize_bounded(sweep, torch.ones(3), -zero, top - zero)
    for row, z in enumerate(zero.tolist()):
        assert codes[row].unique().tolist() == list(range(int(-z), int(top - z) + 1))


@BOTH
def test_gradients_are_finite_differences(quantise: Quantise) -> None:
    """In x: of the identity that rounding is taken for; in s: at fixed codes; in the bounds: of x̂ itself."""
    generator = torch.Generator().manual_seed(0)
    scale, low, high = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([-3.0, 0.0, -15.0]), torch.tensor([12.0, 15.0, 0.0])
    x = torch.randn(3, 60, generator=generator) * 12 * scale[:, None]
    upstream = torch.randn(3, 60, generator=generator)
    leaves = [t.clone().requires_grad_() for t in (x, scale, low, high)]
    quantise(*leaves).backward(upstream)
    grads = [leaf.grad.double() for leaf in leaves]

    g, levels = upstream.double(), x.double() / scale.double()[:, None]
    codes = levels.round().clamp(low.double()[:, None], high.double()[:, None])
    below, above = levels.round() < low[:, None], levels.round() > high[:, None]
    assert below.any()
    assert above.any()
    assert not (below | above).all()

    def value(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        real = levels.round().clamp(low.double()[:, None], high.double()[:, None]) * scale.double()[:, None]
        return (real * g).sum(1)

    # Wider by a part of a step, which no code that lay inside notices: in the others x̂ is linear.
    step = 2.0**-6
    by_low = (value(low, high) - value(low - step, high)) / step
    by_high = (value(low, high + step) - value(low, high)) / step
    assert torch.allclose(grads[2], by_low, rtol=1e-4, atol=1e-4)  # float32 sums of 60 terms
    assert torch.allclose(grads[3], by_high, rtol=1e-4, atol=1e-4)
    straight = torch.where(below | above, 0.0, g)
    assert torch.equal(grads[0], straight)
    at_fixed_codes = (codes * g).sum(1)
    assert torch.allclose(grads[1], at_fixed_codes - (straight * levels).sum(1), rtol=1e-4, atol=1e-4)


@BOTH
def test_the_zero_point_moves_what_is_clipped(quantise: Quantise) -> None:
    """∂x̂/∂z = -s outside: both ends of the range go down."""
    zero = torch.tensor([4.0], requires_grad=True)
    whole = round_ste(zero)
    quantise(torch.tensor([[-9.0, 0.7, 30.0]]), torch.tensor([0.5]), -whole, 15 - whole).sum().backward()
    assert zero.grad.tolist() == [-1.0]


@pytest.mark.parametrize("rounded", [round_ste, RoundSte.apply], ids=["op", "direct"])
def test_rounding_lets_gradients_through(rounded: Any) -> None:
    x = torch.tensor([-1.5, -0.2, 0.5, 1.5, 2.6], requires_grad=True)
    y = rounded(x)
    assert y.tolist() == [-2.0, 0.0, 0.0, 2.0, 3.0]
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("bits", [3, 4])
def test_rows_that_share_their_bounds_are_clipped_as_those_that_do_not(bits: int) -> None:
    """The quicker way for one timestep gives each row the same bits as a batch whose last row has other bounds."""
    generator = torch.Generator().manual_seed(bits)
    x, grad = (9 * torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    scale, low = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([-3.0, -3.0, -3.0])
    high = low + 2**bits - 1
    found = []
    for last in (0.0, 1.0):
        given = [x.clone(), scale.clone(), low.clone(), high + torch.tensor([0.0, 0.0, last])]
        for tensor in given:
            tensor.requires_grad_()
        FakeQuantizeBounded.apply(*given).backward(grad)
        found.append([FakeQuantizeBounded.apply(*given).detach(), *(tensor.grad for tensor in given)])
    for same, other in zip(*found, strict=True):
        assert torch.equal(same[:2], other[:2])
        assert float(same[:2].abs().sum()) > 0
    assert not torch.equal(found[0][0][2], found[1][0][2])
    empty = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), torch.zeros(0)
    assert fake_quantize_bounded(*empty).shape == (0, 4)
