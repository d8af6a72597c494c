"""`int_conv2d`: sums bit for bit in every form of the weight and every window, and the epilogue on images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_oracle import Fence, conv_sums, fenced
from product_cases import FORMS, TOLERANCES, Form, layer, random_codes

from hqc.kernels import Epilogue, Weight, int_conv2d
from hqc.kernels.cards import card_of
from hqc.kernels.tiles import product_tile
from hqc.ops import int_conv2d as reference
from hqc.ops import rescale

NAN = float("nan")
PLAIN = Epilogue(dtype=torch.float32)
WINDOWS = {
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3-stride2": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1-stride2": ((1, 1), (2, 2), (0, 0), (1, 1)),
    "3x1-uneven": ((3, 1), (2, 1), (0, 2), (1, 2)),
}


def sums(codes: torch.Tensor, weight: Weight, shape: tuple[int, ...], device: str, **window: object) -> np.ndarray:
    """The kernel's sums: scales of 1, float32, which holds them exactly below 2^24."""
    out = Fence(shape, torch.float32, NAN, device)
    scale = torch.ones(codes.shape[0], device=device)
    int_conv2d(fenced(codes, 77, device), weight, scale, PLAIN, out=out.tensor, **window)
    assert out.intact()
    return out.tensor.cpu().numpy()


# Both windows for the simple forms and the widest of either rotation; of the others one each, in turns.
@pytest.mark.parametrize(
    ("form", "window"),
    [
        (form, window)
        for turn, form in enumerate(FORMS)
        for place, window in enumerate(("3x3", "1x1-stride2"))
        if form.block in (1, 256) or (turn + place) % 2
    ],
    ids=str,
)
def test_sums_are_exact(form: Form, window: str, device: str) -> None:
    kernel, stride, padding, dilation = WINDOWS[window]
    generator = torch.Generator().manual_seed(form.block)
    channels = max(48, 2 * form.block) if form.block < 128 else form.block
    weight, integers = layer(form, (17, *kernel, channels), generator, device)
    codes = random_codes((2, 5, 4, channels), 7, generator)
    wanted = conv_sums(codes.numpy(), integers, stride, padding, dilation)
    assert 0 < np.abs(wanted).max() < 2**24
    found = sums(codes, weight, wanted.shape, device, stride=stride, padding=padding, dilation=dilation)
    assert np.array_equal(found, wanted)


# Every window with every form and every number of channels.
@pytest.mark.parametrize(
    ("window", "channels", "form"),
    [
        (window, channels, Form("int8") if (turn + place) % 2 else Form("packed"))
        for turn, window in enumerate(WINDOWS)
        for place, channels in enumerate((3, 4, 9, 80))
    ],
    ids=str,
)
def test_any_window_and_channels(window: str, channels: int, form: Form, device: str) -> None:
    """Odd images; channels that no tile divides; strides, paddings and dilations that differ by axis."""
    kernel, stride, padding, dilation = WINDOWS[window]
    generator = torch.Generator().manual_seed(channels)
    weight, integers = layer(form, (9, *kernel, channels), generator, device)
    codes = random_codes((2, 7, 5, channels), 7, generator)
    wanted = conv_sums(codes.numpy(), integers, stride, padding, dilation)
    found = sums(codes, weight, wanted.shape, device, stride=stride, padding=padding, dilation=dilation)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("form", [Form("int8"), Form("packed", 32)], ids=str)
def test_a_split_inner_axis(form: Form, device: str) -> None:
    """Parts begin in the middle of a tap; each image has its scale."""
    generator = torch.Generator().manual_seed(10)
    weight, integers = layer(form, (20, 3, 3, 480), generator, device)
    codes = random_codes((2, 3, 3, 480), 7, generator)
    card = card_of(torch.device(device))
    tile = product_tile(18, 20, 480, taps=9, rotation=form.block, card=card)
    chunks = -(-480 // tile.channels)
    assert tile.splits > 1
    assert -(-9 * chunks // tile.splits) % chunks
    wanted = conv_sums(codes.numpy(), integers, (1, 1), (1, 1), (1, 1))
    scale = torch.tensor([1.0, 2.0])
    out = Fence(wanted.shape, torch.float32, NAN, device)
    int_conv2d(fenced(codes, 77, device), weight, fenced(scale, NAN, device), PLAIN, padding=(1, 1), out=out.tensor)
    assert out.intact()
    assert np.array_equal(out.tensor.cpu().numpy(), wanted * np.array([1, 2])[:, None, None, None])


def test_padding_is_code_zero_on_every_side(device: str) -> None:
    """A kernel of ones counts the pixels inside the image."""
    weight = Weight(torch.ones(1, 3, 3, 32, dtype=torch.int8, device=device), torch.ones(1, device=device))
    found = sums(torch.ones(1, 3, 3, 32, dtype=torch.int8), weight, (1, 3, 3, 1), device, padding=(1, 1))
    assert (found.reshape(3, 3) / 32).tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_epilogue_on_images(dtype: torch.dtype, device: str) -> None:
    """Scales by sample, bias by channel, residual by pixel, SiLU: against torch's operators in NCHW."""
    generator = torch.Generator().manual_seed(8)
    weight, integers = layer(Form("packed", 16), (20, 3, 3, 48), generator, device)
    codes = random_codes((2, 6, 5, 48), 7, generator)
    scale, weight_scale = torch.tensor([0.02, 0.004]), torch.rand(20, generator=generator) * 0.02 + 0.001
    bias, residual = torch.randn(20, generator=generator), torch.randn(2, 3, 3, 20, generator=generator).to(dtype)
    oihw = torch.from_numpy(integers).permute(0, 3, 1, 2).to(torch.int16)
    acc = reference(codes.permute(0, 3, 1, 2).contiguous(), oihw, [2, 2], [1, 1], [1, 1], 7)
    summed = rescale(acc, scale, weight_scale, bias, 1).permute(0, 2, 3, 1).double() + residual.double()
    wanted = summed * torch.sigmoid(summed)
    out = Fence((2, 3, 3, 20), dtype, NAN, device)
    int_conv2d(
        fenced(codes, 77, device),
        replace(weight, scale=fenced(weight_scale, NAN, device)),
        fenced(scale, NAN, device),
        Epilogue(fenced(bias, NAN, device), fenced(residual, NAN, device), True, dtype),
        stride=(2, 2),
        padding=(1, 1),
        out=out.tensor,
    )
    assert out.intact()
    error = (out.tensor.cpu().double() - wanted).abs()
    # Terms of up to 8 cancel in the sum.
    assert (error <= TOLERANCES[dtype] * (wanted.abs() + 8 * TOLERANCES[torch.float32] / TOLERANCES[dtype])).all()
    assert error.max() > 0
    assert wanted.abs().max() > 1
