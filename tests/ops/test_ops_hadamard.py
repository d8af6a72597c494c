"""The rotation: its matrix, its algebra, both axes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard

from hqc.ops import hadamard, sylvester

ORDERS = (1, 2, 4, 8, 16, 32, 64, 128)
BLOCKS = (8, 16, 32, 64, 128)

# A block of b adds b terms of magnitude ~|x| in float32 (2^-24 relative each, pairwise or in any order) and rounds
# the factor 1/√b: b·2^-24 ≤ 8e-6 for b = 128 bounds one rotation relative to ‖x‖; twice for there and back.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 4e-14}

relaxed = settings(deadline=None, derandomize=True, max_examples=40)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("order", ORDERS)
def test_the_matrix_equals_scipys(order: int) -> None:
    assert np.array_equal(sylvester(order).numpy(), scipy_hadamard(order))


@pytest.mark.parametrize("order", ORDERS)
def test_the_matrix_is_symmetric_and_its_square_is_order_times_identity(order: int) -> None:
    matrix = sylvester(order, torch.float64)
    assert torch.equal(matrix, matrix.T)
    # Integers below 2^53: exact.
    assert torch.equal(matrix @ matrix, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [0, -8, 3, 12, 48])
def test_an_order_that_is_no_power_of_two_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"the order is {order}; expected a power of two"):
        sylvester(order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("block", BLOCKS)
def test_twice_is_identity_and_energy_is_kept(block: int, axis: int, dtype: torch.dtype) -> None:
    shape = (2, 2 * block, 3, 5) if axis == 1 else (2, 3, 2 * block)
    x = random(shape, block, dtype)
    once = hadamard(x, block, axis)
    assert (once - x).norm() > 0.5 * x.norm(), "nothing was rotated"
    assert (hadamard(once, block, axis) - x).norm() <= TOLERANCE[dtype] * x.norm()
    assert abs(float(once.norm() / x.norm()) - 1) <= TOLERANCE[dtype]


@relaxed
@given(
    block=st.sampled_from(BLOCKS[:4]),
    groups=st.integers(1, 3),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**31),
)
def test_axis_1_equals_the_permuted_last_axis(
    block: int, groups: int, batch: int, size: tuple[int, int], seed: int
) -> None:
    x = random((batch, groups * block, *size), seed)
    images = hadamard(x, block, 1)
    tokens = hadamard(x.permute(0, 2, 3, 1).contiguous(), block, -1).permute(0, 3, 1, 2)
    # The same sums in another order.
    assert (images - tokens).norm() <= TOLERANCE[torch.float32] * x.norm()


@relaxed
@given(block=st.sampled_from(BLOCKS[:3]), groups=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_against_an_independent_numpy_matrix(block: int, groups: int, seed: int) -> None:
    x = random((2, 3, groups * block), seed, torch.float64)
    matrix = np.kron(np.eye(groups), scipy_hadamard(block)) / np.sqrt(block)
    expected = x.numpy() @ matrix
    error = np.linalg.norm(hadamard(x, block, -1).numpy() - expected)
    assert error <= TOLERANCE[torch.float64] * np.linalg.norm(expected)


def test_a_strided_input_gives_what_its_copy_gives() -> None:
    x = random((2, 5, 7, 32), 1).permute(0, 3, 1, 2)
    assert not x.is_contiguous()
    assert torch.equal(hadamard(x, 32, 1), hadamard(x.contiguous(), 32, 1))


@pytest.mark.parametrize("axis", [0, 2])
def test_other_axes_are_refused(axis: int) -> None:
    with pytest.raises(ValueError, match=f"axis {axis} of 4; expected 1 or the last"):
        hadamard(random((8, 8, 8, 8), 0), 8, axis)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_gradient_is_the_rotation_of_the_gradient(axis: int) -> None:
    x = random((2, 8, 3, 8), 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: hadamard(v, 8, axis), (x,))  # float64: torch's own 1e-6 bound
    upstream = random((2, 8, 3, 8), 4, torch.float64)
    (grad,) = torch.autograd.grad(hadamard(x, 8, axis), x, upstream)
    assert torch.equal(grad, hadamard(upstream, 8, axis))


def test_one_outlier_is_spread_over_its_block() -> None:
    x = torch.zeros(1, 64)
    x[0, 5] = 32.0
    rotated = hadamard(x, 32, -1)
    # 32/√32 in float32 for every channel of the block, nothing outside it.
    assert rotated[0, :32].abs().unique().numel() == 1
    assert rotated[0, :32].abs().max() == pytest.approx(32 / 32**0.5, rel=1e-6)  # one float32 product
    assert torch.equal(rotated[0, 32:], torch.zeros(32))
