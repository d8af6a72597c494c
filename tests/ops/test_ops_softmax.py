"""The quantiser of a softmax: numpy in even steps and in powers of two, its ends, gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.ops import softmax_quantize
from hqc.ops.softmax_quantize import LEAST, SoftmaxQuantize

relaxed = settings(deadline=None, derandomize=True, max_examples=60)


def by_hand(p: np.ndarray, scale: np.ndarray, log2: np.ndarray, bits: int) -> np.ndarray:
    """In float64, row by row."""
    top, found = 2**bits - 1, np.empty(p.shape)
    for row, (values, s, powers) in enumerate(zip(p.astype(np.float64), scale.astype(np.float64), log2, strict=True)):
        if powers:
            found[row] = 2.0 ** -np.clip(np.rint(-np.log2(np.maximum(values, 2.0**-126))), 0, top)
        else:
            found[row] = s * np.clip(np.rint(values / s), 0, top)
    return found


@relaxed
@given(bits=st.integers(2, 8), spread=st.floats(0, 20), seed=st.integers(0, 2**31))
def test_it_equals_numpy(bits: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((4, 3, 7)) * spread
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).astype(np.float32)
    scale = (rng.uniform(0.2, 1.1, 4) / (2**bits - 1)).astype(np.float32)
    log2 = np.array([0, 1, 1, 0], dtype=np.float32)
    found = softmax_quantize(*map(torch.from_numpy, (p, scale, log2)), bits).numpy()
    wanted = by_hand(p, scale, log2, bits)
    levels = np.where(log2[:, None, None] > 0, -np.log2(np.maximum(p, 2.0**-126)), p / scale[:, None, None])
    on_a_boundary = np.abs(levels - np.floor(levels) - 0.5) < 1e-4
    np.testing.assert_allclose(found[~on_a_boundary], wanted[~on_a_boundary], rtol=1e-6, atol=1e-37)


def test_its_ends() -> None:
    """One, a hundredth, nothing, and less than float32 holds at full precision."""
    p = torch.tensor([[1.0, 0.01, 0.0, LEAST / 4]] * 2)
    found = softmax_quantize(p, torch.full((2,), 1 / 15), torch.tensor([0.0, 1.0]), 4)
    torch.testing.assert_close(found[0], torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert found[1].tolist() == [1.0, 2.0**-7, 2.0**-15, 2.0**-15]
    wide = softmax_quantize(p[:1], torch.ones(1), torch.ones(1), 8)
    assert wide[0].tolist() == [1.0, 2.0**-7, LEAST, LEAST]


@pytest.mark.parametrize("quantise", [softmax_quantize, SoftmaxQuantize.apply], ids=["op", "direct"])
def test_gradients_pass_straight_through(quantise: object) -> None:
    p = torch.tensor([[0.5, 0.11, 0.9], [0.5, 1e-9, 0.9]], requires_grad=True)
    scale = torch.tensor([0.05, 0.05], requires_grad=True)
    found = quantise(p, scale, torch.tensor([0.0, 1.0]), 4)  # type: ignore[operator]
    upstream = torch.tensor([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]])
    found.backward(upstream)
    # 0.9 is above 15 steps of 0.05, and 1e-9 below the least power of two: clipped, no gradient passes.
    assert p.grad is not None
    assert p.grad.tolist() == [[2.0, 3.0, 0.0], [7.0, 0.0, 13.0]]
    assert scale.grad is not None
    # round(p/s) - p/s inside, 15 above; powers of two have no scale.
    torch.testing.assert_close(scale.grad, torch.tensor([3 * (2 - 2.2) + 5 * 15, 0.0]))
