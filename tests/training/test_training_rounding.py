"""Learnt rounding against enumeration, plain torch, and the quantiser that has to give the same codes."""

from itertools import product

import pytest
import torch
from torch import Tensor

from hqc.bits import asymmetric_top, weight_range
from hqc.ops.bounded import fake_quantize_bounded, quantize_bounded
from hqc.ops.fake_quantize import fake_quantize
from hqc.ops.quantize import quantize
from hqc.training.rounding import SoftRounding, annealed, coded, undecided


def weight_and_scale(seed: int = 0, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 3, 3, 3, generator=generator)
    return weight, 0.05 + torch.rand(rows, generator=generator)


@pytest.mark.parametrize("bits", range(2, 9))
def test_its_own_quantiser_gives_the_codes_again(bits: int) -> None:
    """Exactly, at scales of every size: symmetric ranges."""
    weight, scale = weight_and_scale(bits)
    scale = scale * torch.tensor([1e-6, 1e-3, 1.0, 3.0, 1e4])
    low, high = weight_range(bits)
    one = SoftRounding(weight * scale.view(-1, 1, 1, 1) * high, scale, low, high)
    with torch.no_grad():
        one.alpha.copy_(torch.randn(one.alpha.shape, generator=torch.Generator().manual_seed(1)))
    codes = one.codes()
    assert codes.min() == low
    assert codes.max() == high
    assert not torch.equal(codes, one.nearest())
    assert torch.equal(quantize(coded(codes, scale), scale, low, high), codes)
    assert torch.equal(fake_quantize(coded(codes, scale), scale, low, high), coded(codes, scale))


@pytest.mark.parametrize("bits", range(2, 8))
def test_an_asymmetric_quantiser_gives_them_again(bits: int) -> None:
    weight, scale = weight_and_scale(bits)
    top = asymmetric_top(bits)
    zero = torch.tensor([0.0, 1.0, top // 2, top - 1, top])
    low, high = -zero, top - zero
    one = SoftRounding(weight * top, scale, low, high)
    codes = one.codes()
    assert {int(row.min()) for row in codes} == set((-zero).int().tolist())
    assert torch.equal(quantize_bounded(coded(codes, scale), scale, low, high), codes)
    assert torch.equal(fake_quantize_bounded(coded(codes, scale), scale, low, high), coded(codes, scale))


def test_it_starts_as_the_weight_itself_and_rounds_to_nearest() -> None:
    weight, scale = weight_and_scale()
    one = SoftRounding(weight, scale, -100, 100)
    torch.testing.assert_close(one.weight(one.share()), weight, rtol=0, atol=1e-5)
    assert torch.equal(one.codes(), one.nearest())
    assert torch.equal(one.nearest(), (weight / scale.view(-1, 1, 1, 1)).round().to(torch.int8))


def test_the_sum_is_zero_where_all_is_decided() -> None:
    assert float(undecided(torch.tensor([0.0, 1.0, 1.0]), 7.0)) == 0.0
    assert float(undecided(torch.tensor([0.5, 0.5]), 7.0)) == 2.0
    assert float(undecided(torch.tensor([0.25]), 2.0)) == pytest.approx(1 - 0.25)


def test_beta_falls_behind_the_warm_up() -> None:
    assert annealed(0.19, 0.2, 20, 2) is None
    assert annealed(0.2, 0.2, 20, 2) == 20
    assert annealed(0.6, 0.2, 20, 2) == pytest.approx(11)
    assert annealed(1.0, 0.2, 20, 2) == pytest.approx(2)


_STEPS = 1000


def learnt(weight: Tensor, scale: Tensor, x: Tensor, bound: int, penalty: float) -> SoftRounding:
    """AdaRound of one linear layer on all of x."""
    one = SoftRounding(weight, scale, -bound, bound)
    optimizer = torch.optim.Adam([one.alpha], lr=0.02)
    wanted = x @ weight.T
    for step in range(_STEPS):
        share = one.share()
        loss = (x @ one.weight(share).T - wanted).square().sum(1).mean()
        beta = annealed(step / _STEPS, 0.2, 20, 2)
        if beta is not None:
            loss = loss + penalty * undecided(share, beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return one


def test_it_is_near_the_best_of_all_roundings() -> None:
    """Every 2^10 rounding of ten weights that read correlated inputs: half of what nearest loses to the best is won."""
    lost, won, decided = 0.0, 0.0, 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 3, generator=generator) @ torch.randn(3, 10, generator=generator)
        x = x + 0.1 * torch.randn(64, 10, generator=generator)
        weight, scale = torch.randn(1, 10, generator=generator), torch.tensor([0.5])
        one, below = learnt(weight, scale, x, 7, penalty=0.01), (weight / 0.5).floor()
        gram = x.T @ x

        def error(codes: Tensor, *, of: Tensor = weight, s: Tensor = scale, g: Tensor = gram) -> float:
            off = coded(codes, s) - of
            return float((off @ g @ off.T).sum())

        best = min(error(below + torch.tensor([bits])) for bits in product((0, 1), repeat=10))
        nearest, found = error(one.nearest()), error(one.codes())
        assert best <= found * (1 + 1e-4)
        assert found <= nearest * (1 + 1e-4)
        lost, won = lost + nearest - best, won + nearest - found
        share = one.share()
        decided += int(((share < 0.01) | (share > 0.99)).sum())
    assert won > 0.5 * lost > 0
    assert decided >= 45  # of 60


def test_nearest_is_not_best_where_errors_add_up() -> None:
    """Ten weights of 0.4 of a step that read one value: nearest gives 0, four of them up give it exactly."""
    x = torch.randn(32, 1, generator=torch.Generator().manual_seed(3)).expand(32, 10)
    weight, scale = torch.full((1, 10), 0.4), torch.ones(1)
    one = learnt(weight + 0.001 * torch.arange(10), scale, x, 7, penalty=0.1)
    assert int(one.nearest().sum()) == 0
    assert int(one.codes().sum()) == 4
