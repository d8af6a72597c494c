"""The quantiser with a binary code beside: numpy, its best step, gradients."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hqc.ops import fake_quantize_bounded, fake_quantize_residual
from hqc.ops.residual import FakeQuantizeResidual

BOTH = pytest.mark.parametrize("quantise", [fake_quantize_residual, FakeQuantizeResidual.apply], ids=["op", "direct"])
SCALE, LOW, HIGH = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([-3.0, 0.0, -7.0]), torch.tensor([4.0, 7.0, 0.0])


def values(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * 6 * SCALE[:, None]


@BOTH
def test_it_is_the_code_and_the_sign_of_what_is_left(quantise: Callable[..., torch.Tensor]) -> None:
    x, step = values(), torch.tensor([0.1, 0.0, 0.6])
    s, low, high, a = (t.numpy()[:, None] for t in (SCALE, LOW, HIGH, step))
    base = np.clip(np.rint(x.numpy() * (np.float32(1) / s)), low, high) * s
    assert np.array_equal(quantise(x, SCALE, LOW, HIGH, step).numpy(), np.sign(x.numpy() - base) * a + base)
    assert not quantise(torch.zeros(3, 2), SCALE, LOW, HIGH, step).any()


def test_the_mean_of_what_is_left_is_the_best_step() -> None:
    x = values()
    left = (x - fake_quantize_bounded(x, SCALE, LOW, HIGH)).abs().mean(1)
    errors = [
        (fake_quantize_residual(x, SCALE, LOW, HIGH, left * factor) - x).square().sum(1)
        for factor in (1.0, 0.0, 0.9, 1.1)
    ]
    assert all(bool((errors[0] < other).all()) for other in errors[1:])


@BOTH
def test_gradients(quantise: Callable[..., torch.Tensor]) -> None:
    """Those of the bounded quantiser, and to the step the finite difference, in which x̂ is linear."""
    upstream, step = values(1), torch.tensor([0.1, 0.2, 0.6])
    leaves = [t.clone().requires_grad_() for t in (values(), SCALE, LOW, HIGH, step)]
    quantise(*leaves).backward(upstream)
    plain = [t.clone().requires_grad_() for t in (values(), SCALE, LOW, HIGH)]
    fake_quantize_bounded(*plain).backward(upstream)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves[:4], plain, strict=True))
    x, wide = values().double(), [t.double() for t in (SCALE, LOW, HIGH)]
    moved = [
        (fake_quantize_residual(x, *wide, step.double() + change) * upstream).sum(1) for change in (2.0**-8, -(2.0**-8))
    ]
    assert torch.allclose(leaves[4].grad.double(), (moved[0] - moved[1]) * 2**7, rtol=1e-4)
    assert bool((leaves[4].grad != 0).all())
