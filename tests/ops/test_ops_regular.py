"""The regular Hadamard matrix: Kronecker powers against the parity of bits, its algebra, and the operators with it."""

import numpy as np
import pytest
import torch

from hqc.ops import hadamard, regular, rotate_codes, sylvester
from hqc.ops.hadamard import Hadamard

ORDERS = (4, 8, 16, 32, 64, 128, 256)
POWERS_OF_FOUR = (4, 16, 64, 256)
BLOCKS = (16, 32, 64, 256)
FOURTH = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])

# As for Sylvester's matrix: b terms and one factor, each rounded to 2^-24, twice for there and back.
TOLERANCE = 4e-5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sign(i: int, j: int, order: int) -> int:
    """By bits: pairs from the top, and one single bit at the bottom where the order is no power of four."""
    single = order.bit_length() % 2 == 0
    e, parity = i ^ j, (i & j & 1) if single else 0
    mask = sum(1 << bit for bit in range(int(single), order.bit_length() - 1, 2))
    return 1 - 2 * (((e & (e >> 1) & mask).bit_count() + parity) % 2)


@pytest.mark.parametrize("order", ORDERS)
def test_the_matrix_is_that_of_the_parity_formula(order: int) -> None:
    assert np.array_equal(regular(order).numpy(), [[sign(i, j, order) for j in range(order)] for i in range(order)])


@pytest.mark.parametrize("order", ORDERS)
def test_the_matrix_is_a_kronecker_product(order: int) -> None:
    product = np.array([[1, 1], [1, -1]]) if order.bit_length() % 2 == 0 else np.array([[1]])
    while len(product) < order:
        product = np.kron(FOURTH, product)
    assert np.array_equal(regular(order).numpy(), product)


@pytest.mark.parametrize("order", ORDERS)
def test_the_matrix_is_symmetric_and_its_square_is_order_times_identity(order: int) -> None:
    matrix = regular(order, torch.float64)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))


@pytest.mark.parametrize("order", POWERS_OF_FOUR)
def test_every_row_sums_to_the_root_of_the_order(order: int) -> None:
    assert regular(order).sum(1).unique().tolist() == [2 ** (order.bit_length() // 2)]
    assert sylvester(order).sum(1).unique().tolist() == [0, order], "which is what Sylvester's does not"


@pytest.mark.parametrize("order", [0, 1, 2, 12, 48])
def test_an_order_that_is_none_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"the order is {order}; expected a power of two from 4"):
        regular(order)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_rotation_is_that_of_the_matrix_and_its_own_inverse(block: int, axis: int) -> None:
    x = random(2, 2 * block, 3, 5) if axis == 1 else random(2, 3, 2 * block)
    once = hadamard(x, block, axis, True)
    first = x.movedim(axis, -1).double().numpy()
    matrix = np.kron(np.eye(2), regular(block).numpy()) / np.sqrt(block)
    wanted = torch.from_numpy(first @ matrix).movedim(-1, axis)
    assert (once - wanted).norm() <= TOLERANCE * x.norm()
    assert (hadamard(once, block, axis, True) - x).norm() <= TOLERANCE * x.norm()
    assert (hadamard(x, block, axis) - once).norm() > 0.5 * x.norm() if block <= 128 else True


def test_a_common_mean_stays_spread_out() -> None:
    x = torch.ones(1, 64)
    assert hadamard(x, 64, -1).abs().max() == 8, "Sylvester's collects it in one coordinate"
    assert torch.equal(hadamard(x, 64, -1, True), x)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_gradient_is_the_rotation_of_the_gradient(axis: int) -> None:
    x = random(2, 16, 2, 16, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: hadamard(v, 16, axis, True), (x,))
    upstream = random(2, 16, 2, 16, seed=4, dtype=torch.float64)
    for rotate in (lambda: hadamard(x, 16, axis, True), lambda: Hadamard.apply(x, 16, axis, True)):
        (grad,) = torch.autograd.grad(rotate(), x, upstream)
        assert torch.equal(grad, hadamard(upstream, 16, axis, True))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tail", [(), (3, 3)], ids=["linear", "conv"])
def test_codes_are_rotated_exactly(block: int, tail: tuple[int, ...]) -> None:
    codes = torch.randint(-128, 128, (3, 2 * block, *tail), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    matrix = np.kron(np.eye(2, dtype=np.int64), regular(block).numpy().astype(np.int64))
    wanted = np.einsum("ij,oj...->oi...", matrix, codes.numpy().astype(np.int64))
    found = rotate_codes(codes, block, True)
    assert found.dtype == torch.int16
    assert np.array_equal(found.numpy(), wanted)


def test_the_largest_codes_of_order_256_fit_int16() -> None:
    signs = regular(256)[:1]
    highest = torch.where(signs > 0, 127, -128).to(torch.int8)
    assert int(rotate_codes(highest, 256, True)[0, 0]) == 136 * 127 + 120 * 128
    assert int(rotate_codes(torch.where(signs > 0, -128, 127).to(torch.int8), 256, True)[0, 0]) == -(
        136 * 128 + 120 * 127
    )
