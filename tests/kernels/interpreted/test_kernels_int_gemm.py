"""`int_gemm`: sums bit for bit in every form of the weight, and the epilogue within one rounding of its output."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_oracle import Fence, fenced, product_sums
from product_cases import FORMS, TOLERANCES, Form, layer, random_codes

from hqc.kernels import Epilogue, Weight, int_gemm
from hqc.kernels.cards import card_of
from hqc.kernels.tiles import product_tile
from hqc.ops import half

NAN = float("nan")
PLAIN = Epilogue(dtype=torch.float32)


def sums(codes: torch.Tensor, weight: Weight, device: str, samples: int = 1) -> np.ndarray:
    """The kernel's sums: scales of 1, float32, which holds them exactly below 2^24."""
    out = Fence((*codes.shape[:-1], weight.codes.shape[0]), torch.float32, NAN, device)
    int_gemm(fenced(codes, 77, device), weight, torch.ones(samples, device=device), PLAIN, out=out.tensor)
    assert out.intact()
    return out.tensor.cpu().numpy()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sums_are_exact(form: Form, device: str) -> None:
    generator = torch.Generator().manual_seed(form.block)
    channels = max(48, 2 * form.block) if form.block < 256 else 256
    weight, integers = layer(form, (37, channels), generator, device)
    codes = random_codes((45, channels), 7 if form.name != "int8" else 127, generator)
    wanted = product_sums(codes.numpy(), integers)
    assert 0 < np.abs(wanted).max() < 2**24
    assert np.array_equal(sums(codes, weight, device), wanted)


@pytest.mark.parametrize("form", [Form("int8"), Form("packed"), Form("digits")], ids=str)
@pytest.mark.parametrize("channels", [3, 4, 9, 80, 136])
@pytest.mark.parametrize("outputs", [3, 33])
def test_any_sizes(form: Form, channels: int, outputs: int, device: str) -> None:
    """Channels that no tile divides, odd ones packed, in one row and in many."""
    generator = torch.Generator().manual_seed(channels)
    weight, integers = layer(form, (outputs, channels), generator, device)
    for rows in (1, 19):
        codes = random_codes((rows, channels), 7, generator)
        assert np.array_equal(sums(codes, weight, device), product_sums(codes.numpy(), integers))


def test_large_tiles(device: str) -> None:
    """Enough rows and outputs for the largest tile on every card, in more than one group of tiles."""
    generator = torch.Generator().manual_seed(0)
    weight, integers = layer(Form("packed", 32), (130, 64), generator, device)
    codes = random_codes((9 * 128 * 20 if device == "cuda" else 1160, 64), 7, generator)
    assert np.array_equal(sums(codes, weight, device), product_sums(codes.numpy(), integers))


# The form is the first kernel's matter and the type the second's, which adds up: each with one of the other.
@pytest.mark.parametrize(
    ("form", "dtype"), list(zip([Form("int8"), Form("packed", 32), Form("digits")], TOLERANCES, strict=True)), ids=str
)
def test_a_split_inner_axis(form: Form, dtype: torch.dtype, device: str) -> None:
    """Few rows and outputs of many channels: programs share the sums of a tile, a second kernel adds them up."""
    rows, outputs, channels = 6, 40, 32 * 97
    card = card_of(torch.device(device))
    tile = product_tile(rows, outputs, channels, rotation=form.block, two_digits=form.name == "digits", card=card)
    assert tile.splits > 1
    assert -(-channels // tile.channels) % tile.splits, "the parts are equal"
    generator = torch.Generator().manual_seed(9)
    weight, integers = layer(form, (outputs, channels), generator, device)
    codes = random_codes((2, 3, channels), 7, generator)
    sums_of_all = product_sums(codes.numpy(), integers)
    scale = torch.tensor([10.0, 20.0]) / float(np.abs(sums_of_all).max())  # past 88 the interpreter's exp warns
    bias, residual = (
        torch.randn(outputs, generator=generator),
        torch.randn(2, 3, outputs, generator=generator).to(dtype),
    )
    out = Fence((2, 3, outputs), dtype, NAN, device)
    epilogue = Epilogue(fenced(bias, NAN, device), fenced(residual, NAN, device), True, dtype)
    int_gemm(fenced(codes, 77, device), weight, fenced(scale, NAN, device), epilogue, out=out.tensor)
    assert out.intact()
    product = sums_of_all * scale.double().numpy()[:, None, None]
    summed = product + bias.double().numpy() + residual.double().numpy()
    largest = np.abs(product) + np.abs(bias.double().numpy()) + np.abs(residual.double().numpy())
    error = np.abs(out.tensor.cpu().double().numpy() - summed / (1 + np.exp(-summed)))
    assert (error <= TOLERANCES[dtype] * largest + 1e-7).all(), f"{(error / largest).max():.3g}"
    assert np.abs(product).max() > 0.1


def test_sums_past_float32s_integers(device: str) -> None:
    weight = Weight(torch.full((2, 2048), 127, dtype=torch.int8, device=device), torch.ones(2, device=device))
    found = sums(torch.full((1, 2048), 127, dtype=torch.int8), weight, device)
    assert found.tolist() == [[127 * 127 * 2048] * 2]  # 2^11·127², which float32 holds
    assert found[0, 0] > 2**24


def test_halves_are_counted_once(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randint(-128, 129, (5, 40), generator=generator).to(torch.int16)
    parts = [half(wide, index).to(device) for index in (0, 1)]
    weight = Weight(parts[0], torch.ones(5, device=device), high=parts[1], high_factor=1)
    codes = random_codes((7, 40), 7, generator)
    assert int(wide.max()) == 128
    assert np.array_equal(sums(codes, weight, device), product_sums(codes.numpy(), wide.numpy()))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_the_epilogue(dtype: torch.dtype, silu: bool, residual: bool, bias: bool, device: str) -> None:
    """acc·s_w[o]·s[n] + bias[o] + residual, then SiLU; three samples whose scales differ, in tiles that span them."""
    generator = torch.Generator().manual_seed(2)
    weight, integers = layer(Form("int8"), (35, 64), generator, device)
    codes = random_codes((3, 7, 64), 7, generator)
    scale, weight_scale = torch.tensor([0.01, 0.03, 0.002]), torch.rand(35, generator=generator) * 0.02 + 0.001
    terms = {
        "bias": torch.randn(35, generator=generator) if bias else None,
        "residual": torch.randn(3, 7, 35, generator=generator).to(dtype) if residual else None,
    }
    weight = replace(weight, scale=fenced(weight_scale, NAN, device))
    placed = {name: None if t is None else fenced(t, NAN, device) for name, t in terms.items()}
    out = Fence((3, 7, 35), dtype, NAN, device)
    epilogue = Epilogue(silu=silu, dtype=dtype, **placed)
    int_gemm(fenced(codes, 77, device), weight, fenced(scale, NAN, device), epilogue, out=out.tensor)
    assert out.intact()
    product = (
        product_sums(codes.numpy(), integers) * weight_scale.double().numpy() * scale.double().numpy()[:, None, None]
    )
    wanted = product + sum(t.double().numpy() for t in terms.values() if t is not None)
    largest = np.abs(product) + sum(np.abs(t.double().numpy()) for t in terms.values() if t is not None)
    if silu:
        wanted = wanted / (1 + np.exp(-wanted))
    error = np.abs(out.tensor.cpu().double().numpy() - wanted)
    assert (error <= TOLERANCES[dtype] * largest + 1e-7).all(), f"{(error / largest).max():.3g}"
    assert error.max() > 0
    assert np.abs(wanted[0]).max() < np.abs(wanted[1]).max(), "scales of samples matter"


def test_more_leading_axes(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, _ = layer(Form("int8"), (6, 32), generator, device)
    codes = random_codes((2, 3, 5, 32), 7, generator).to(device)
    scale = torch.tensor([1.0, 3.0], device=device)
    found = int_gemm(codes, weight, scale, PLAIN)
    assert found.shape == (2, 3, 5, 6)
    assert torch.equal(found.view(30, 6), int_gemm(codes.view(2, 15, 32), weight, scale, PLAIN).view(30, 6))
    assert not torch.equal(found, int_gemm(codes, weight, scale.flip(0), PLAIN))


def test_an_empty_batch(device: str) -> None:
    weight = Weight(torch.zeros(4, 32, dtype=torch.int8, device=device), torch.ones(4, device=device))
    codes = torch.empty(1, 0, 32, dtype=torch.int8, device=device)
    assert int_gemm(codes, weight, torch.ones(1, device=device)).shape == (1, 0, 4)
