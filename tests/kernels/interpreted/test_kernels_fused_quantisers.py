"""Norms and gates with their quantisation against torch in float64: odd sizes, two tensors, every activation."""

import pytest
import torch
from kernel_oracle import fenced
from torch import Tensor
from torch.nn import functional

from hqc.kernels import (
    ColumnStatistics,
    GroupNorm,
    LayerNorm,
    Quantiser,
    column_statistics,
    gate_quantize,
    group_norm_quantize,
    hadamard_quantize,
    layer_norm_quantize,
)
from hqc.ops import hadamard

HALF, SINGLE = torch.float16, torch.float32
# float32 arithmetic over rows of some hundred numbers: relative 1e-6 at levels of at most 7.5, with room.
BOUNDARY = 1e-4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = SINGLE, mean: float = 0.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


def quantiser(samples: int, block: int, device: str, top: int = 7, *, regular: bool = False) -> Quantiser:
    inverse = fenced(torch.linspace(0.8, 2.5, samples) * top / 7, float("nan"), device)
    return Quantiser(inverse, -top, top, block, regular)


def check(codes: Tensor | None, y: Tensor, how: Quantiser) -> None:
    """Equal to rounding in float64 wherever the level is not on a rounding boundary."""
    assert codes is not None
    turned = hadamard(y.double(), how.block, -1, how.regular) if how.block > 1 else y.double()
    levels = turned * how.inverse_scale.cpu().double().view(-1, *[1] * (y.ndim - 1))
    clipped = levels.clamp(how.low, how.high)
    doubtful = (clipped - clipped.floor() - 0.5).abs() < BOUNDARY
    assert float(doubtful.double().mean()) < 0.01
    assert torch.equal(codes.cpu().double()[~doubtful], clipped.round()[~doubtful])
    assert float((codes.cpu().double() - clipped).abs().max()) <= 0.5 + BOUNDARY
    assert len(codes.unique()) > 4


def normed(x: Tensor, norm: GroupNorm) -> Tensor:
    """In float64, channels last."""
    weight, bias = ((None if t is None else t.cpu().double()) for t in (norm.weight, norm.bias))
    y = functional.group_norm(x.double().movedim(-1, 1), norm.groups, weight, bias, norm.eps).movedim(1, -1)
    return functional.silu(y) if norm.silu else y


# samples, height, width, channels, groups, block: tiles that images do not fill, groups across tiles, few groups.
IMAGES = [
    (3, 5, 3, 96, 32, 32),
    (2, 9, 4, 80, 8, 16),
    (1, 1, 1, 64, 4, 8),
    (2, 3, 3, 30, 5, 1),
    (1, 12, 12, 48, 16, 16),
]


# Both kinds of norm on the first two images, then in turns.
@pytest.mark.parametrize(
    ("shape", "silu", "affine", "dtype"),
    [
        (shape, *kind)
        for i, shape in enumerate(IMAGES)
        for turn, kind in enumerate([(True, True, HALF), (False, False, SINGLE)])
        if i < 2 or turn == i % 2
    ],
    ids=str,
)
def test_group_norm(shape: tuple[int, ...], silu: bool, affine: bool, dtype: torch.dtype, device: str) -> None:
    n, height, width, channels, groups, block = shape
    x = random(n, height, width, channels, dtype=dtype, mean=3.0)
    affines = (
        [fenced(random(channels, seed=s, mean=1.0), float("nan"), device) for s in (1, 2)] if affine else [None] * 2
    )
    norm, how = GroupNorm(groups, 1e-5, *affines, silu=silu), quantiser(n, block, device)
    source = fenced(x, float("nan"), device)
    codes, kept, _ = group_norm_quantize(source, norm, how, keep=True)
    wanted = normed(x, norm)
    assert kept is not None
    check(codes, wanted, how)
    assert float((kept.cpu().double() - wanted).abs().max()) <= (2**-10 if dtype == HALF else 2e-5) * (
        1 + float(wanted.abs().max())
    )
    only, nothing, _ = group_norm_quantize(source, norm, how)
    assert nothing is None
    assert torch.equal(only, codes)
    none, floats, _ = group_norm_quantize(source, norm, None)
    assert none is None
    assert torch.equal(floats, kept)


@pytest.mark.parametrize(("first", "rest", "groups"), [(64, 32, 32), (48, 80, 16), (96, 64, 32)])
def test_group_norm_of_two_tensors_is_that_of_their_concatenation(
    first: int, rest: int, groups: int, device: str
) -> None:
    x, second = random(2, 6, 5, first, dtype=HALF), random(2, 6, 5, rest, seed=3, dtype=HALF, mean=-2.0)
    norm, how = GroupNorm(groups, 1e-6, silu=True), quantiser(2, 16, device)
    sources = [fenced(t, float("nan"), device) for t in (x, second)]
    codes, _, _ = group_norm_quantize(sources[0], norm, how, second=sources[1])
    check(codes, normed(torch.cat([x, second], -1), norm), how)


@pytest.mark.parametrize("second", [False, True])
def test_codes_of_the_image_itself_come_beside(second: bool, device: str) -> None:
    """For a shortcut around the norm: another block, other bounds, another scale; the same as quantised alone."""
    x, norm, how = random(2, 4, 3, 96, dtype=HALF), GroupNorm(8, 1e-5, silu=True), quantiser(2, 32, device)
    beside = Quantiser(torch.tensor([20.0, 31.0], device=device), -127, 127, 16)
    parts = [x[..., :64].contiguous().to(device), x[..., 64:].contiguous().to(device)] if second else [x.to(device)]
    given = {"second": parts[1]} if second else {}
    codes, nothing, found = group_norm_quantize(parts[0], norm, how, beside=beside, **given)
    assert nothing is None
    assert torch.equal(codes, group_norm_quantize(x.to(device), norm, how)[0])
    alone = hadamard_quantize(x.to(device), beside.inverse_scale, low=-127, high=127, block=16)
    assert torch.equal(found, alone)  # 1/√16 is a power of two: the two orders of the factors round alike
    assert len(found.unique()) > 50


def blocks_of(x: Tensor, rows: int, device: str) -> ColumnStatistics:
    """Statistics in blocks of any size, in float64."""
    parts = [part.double() for part in x.flatten(1, -2).split(rows, 1)]
    values = [torch.stack([p.mean(1), (p - p.mean(1, keepdim=True)).square().sum(1)], 1) for p in parts]
    return ColumnStatistics(torch.stack(values, 1).float().to(device), rows)


@pytest.mark.parametrize("rows", [4, 7, 16, 60])
def test_statistics_may_come_in_blocks_of_any_size(rows: int, device: str) -> None:
    """Few blocks are joined by every tile, many beforehand: 60 pixels are 15 blocks of 4 and 1 of 60."""
    x, second = random(2, 6, 10, 64, mean=30.0), random(2, 6, 10, 32, seed=4)
    norm, how = GroupNorm(8, 1e-5), quantiser(2, 32, device)
    given = {"statistics": blocks_of(x, rows, device), "second_statistics": blocks_of(second, 11, device)}
    codes, _, _ = group_norm_quantize(x.to(device), norm, how, second=second.to(device), **given)
    check(codes, normed(torch.cat([x, second], -1), norm), how)


def test_statistics_of_a_large_mean(device: str) -> None:
    """Sums of squares would lose the deviations: mean 1000, deviation 1."""
    x = random(2, 17, 9, 40, mean=1000.0)
    found = column_statistics(fenced(x, float("nan"), device))
    mean, away = found.values[:, :, 0].cpu(), found.values[:, :, 1].cpu()
    parts = [p.double() for p in x.flatten(1, -2).split(found.rows, 1)]
    assert mean.shape[1] == len(parts) > 1
    for i, part in enumerate(parts):
        assert torch.allclose(mean[:, i].double(), part.mean(1), rtol=1e-6)
        deviations = (part - part.mean(1, keepdim=True)).square().sum(1)
        assert torch.allclose(away[:, i].double(), deviations, rtol=1e-4)  # float32 at 1000: 6e-5 of a deviation of 1


@pytest.mark.parametrize("shape", [(2, 5, 96), (3, 7, 160), (1, 1, 64), (2, 3, 40), (2, 9, 384)], ids=str)
@pytest.mark.parametrize(("affine", "dtype"), [(True, HALF), (False, SINGLE)])
def test_layer_norm(shape: tuple[int, ...], affine: bool, dtype: torch.dtype, device: str) -> None:
    channels, block = shape[-1], 8 if shape[-1] == 40 else 32
    x = random(*shape, dtype=dtype, mean=2.0)
    affines = [fenced(random(channels, seed=s), float("nan"), device) for s in (1, 2)] if affine else [None] * 2
    norm, how = LayerNorm(1e-5, *affines), quantiser(shape[0], block, device)
    codes, kept = layer_norm_quantize(fenced(x, float("nan"), device), norm, how, keep=True)
    weight, bias = (None if t is None else t.cpu().double() for t in affines)
    wanted = functional.layer_norm(x.double(), (channels,), weight, bias, 1e-5)
    assert kept is not None
    check(codes, wanted, how)
    assert float((kept.cpu().double() - wanted).abs().max()) <= (2**-8 if dtype == HALF else 1e-5)
    assert torch.equal(layer_norm_quantize(x.to(device), norm, how)[0], codes)


ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "none": lambda x: x,
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 96), (3, 1, 40), (1, 19, 160)], ids=str)
def test_gates(kind: str, gated: bool, shape: tuple[int, ...], device: str) -> None:
    x = 1.5 * random(*shape[:-1], shape[-1] * (2 if gated else 1), dtype=HALF)
    how = quantiser(shape[0], 8, device)
    codes = gate_quantize(fenced(x, float("nan"), device), how, kind=kind, gated=gated)
    a, g = x.double().chunk(2, -1) if gated else (1.0, x.double())
    check(codes, a * ACTIVATIONS[kind](g), how)


@pytest.mark.parametrize("block", [16, 32, 64, 256])
def test_regular_rotations_behind_every_norm_and_gate(block: int, device: str) -> None:
    x, how = random(2, 6, 2, 256, dtype=HALF, mean=1.0), quantiser(2, block, device, regular=True)
    norm = GroupNorm(8, 1e-5, silu=True)
    beside = quantiser(2, 16, device, top=127, regular=True)
    codes, _, other = group_norm_quantize(x.to(device), norm, how, beside=beside)
    check(codes, normed(x, norm), how)
    check(other, x, beside)
    tokens = x.flatten(1, 2)
    codes, _ = layer_norm_quantize(tokens.to(device), LayerNorm(1e-5), how)
    check(codes, functional.layer_norm(tokens.double(), (256,)), how)
    a, g = torch.cat([tokens, 2 * tokens.flip(1)], -1).double().chunk(2, -1)
    gated = gate_quantize(torch.cat([a, g], -1).to(HALF).to(device), how, kind="silu", gated=True)
    check(gated, a * functional.silu(g), how)


def test_rows_that_lie_apart_and_tensors_side_by_side(device: str) -> None:
    """A slice of a wider tensor, and two tensors, are quantised without a copy of their own."""
    wide, how = random(2, 6, 160, dtype=HALF).to(device), {"low": -7, "high": 7, "block": 32}
    inverse = torch.tensor([1.0, 2.0], device=device)
    piece = wide[..., 32:96]
    assert torch.equal(hadamard_quantize(piece, inverse, **how), hadamard_quantize(piece.contiguous(), inverse, **how))
    parts = [wide[..., :48].contiguous(), wide[..., 48:].contiguous()]
    found = hadamard_quantize(parts[0], inverse, second=parts[1], **how)
    assert torch.equal(found, hadamard_quantize(wide, inverse, **how))
