"""`hadamard_quantize` against torch's operators and float64: every block, dtype and layout, packed and not."""

import numpy as np
import pytest
import torch
from kernel_oracle import Fence, fenced, levels
from torch import Tensor

from hqc.kernels import hadamard_quantize, pack_weight
from hqc.ops import hadamard, quantize

ROTATIONS = [*((block, False) for block in (1, 8, 16, 32, 64, 128, 256)), *((b, True) for b in (16, 32, 64, 256))]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCALES = [0.31, 0.07, 1.9]
NO_CODE = 99  # outside -7…7
# float32 sums of up to 256 terms and two factors: relative error 1e-6 at the level, at most 7.5 in size, with room.
BOUNDARY = 1e-4


def codes_between(
    x: Tensor,
    scale: Tensor,
    device: str,
    *,
    block: int,
    regular: bool = False,
    nchw: bool = False,
    packed: bool = False,
    bound: int = 7,
) -> Tensor:
    """The kernel's codes, input and output between poison, which must be left alone."""
    places = x.shape[2:] if nchw else x.shape[1:-1]
    channels = x.shape[1] if nchw else x.shape[-1]
    shape = (x.shape[0], *places, channels // 2 if packed else channels)
    out = Fence(shape, torch.uint8 if packed else torch.int8, NO_CODE, device)
    source, inverse = fenced(x, float("nan"), device), fenced(scale.reciprocal(), float("nan"), device)
    found = hadamard_quantize(
        source,
        inverse,
        low=-bound,
        high=bound,
        block=block,
        regular=regular,
        nchw=nchw,
        packed=packed,
        out=out.tensor,
    )
    assert found is out.tensor
    assert out.intact()
    return found.cpu()


def check(found: Tensor, x: Tensor, scale: Tensor, block: int, bound: int = 7, *, regular: bool = False) -> None:
    """Equal to torch's operators wherever float64 says that the level is not on a rounding boundary."""
    wide = x.to(torch.float32)
    wanted = quantize(hadamard(wide, block, -1, regular) if block > 1 else wide, scale, -bound, bound)
    exact = np.clip(levels(x, scale.reciprocal(), block, regular=regular), -bound, bound)
    doubtful = np.abs(exact - np.floor(exact) - 0.5) < BOUNDARY
    assert doubtful.mean() < 0.01
    assert np.array_equal(found.numpy()[~doubtful], wanted.numpy()[~doubtful])
    assert np.abs(found.numpy()[doubtful] - exact[doubtful]).max(initial=0) <= 0.5 + BOUNDARY
    assert {-bound, 0, bound} <= set(found.flatten().tolist()), "the range is used and clipped at both ends"


# Every rotation in either layout; the type, in which the kernel only reads, in turns: two for each rotation.
@pytest.mark.parametrize("nchw", [False, True], ids=["rows", "nchw"])
@pytest.mark.parametrize(
    ("block", "regular", "turn"), [(*rotation, turn) for turn, rotation in enumerate(ROTATIONS)], ids=str
)
def test_codes_are_those_of_the_operators(block: int, regular: bool, turn: int, nchw: bool, device: str) -> None:
    dtype = DTYPES[(turn + nchw) % len(DTYPES)]
    generator = torch.Generator().manual_seed(block)
    channels = {1: 10, 8: 24, 16: 48, 32: 96}.get(block, block)
    x = torch.randn(3, 3, 7, channels, generator=generator).to(dtype)
    scale = torch.tensor(SCALES)
    source = x.permute(0, 3, 1, 2).contiguous() if nchw else x
    how = {"block": block, "regular": regular, "nchw": nchw}
    found = codes_between(source, scale, device, **how)
    check(found, x, scale, block, regular=regular)
    packed = codes_between(source, scale, device, **how, packed=True)
    assert torch.equal(packed, pack_weight(found))


@pytest.mark.parametrize("channels", [3, 4, 9, 48, 80, 320])
@pytest.mark.parametrize("nchw", [False, True], ids=["rows", "nchw"])
def test_any_number_of_channels(channels: int, nchw: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(channels)
    block = next((b for b in (32, 16, 8) if channels % b == 0), 1)
    x = torch.randn(2, 5, 5, channels, generator=generator)
    scale = torch.tensor([0.2, 0.4])
    source = x.permute(0, 3, 1, 2).contiguous() if nchw else x
    check(codes_between(source, scale, device, block=block, nchw=nchw), x, scale, block)


@pytest.mark.parametrize("length", [1, 2, 77, 130])
def test_tokens_of_any_length(length: int, device: str) -> None:
    """A tile spans samples, whose scales differ by 27 times."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(3, length, 64, generator=generator).to(torch.float16)
    scale = torch.tensor(SCALES)
    found = codes_between(x, scale, device, block=32)
    check(found, x, scale, 32)
    assert not torch.equal(found, codes_between(x, scale.flip(0), device, block=32))


def test_one_row_a_sample(device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x, scale = torch.randn(5, 64, generator=generator), torch.rand(5, generator=generator) + 0.2
    check(codes_between(x, scale, device, block=16), x, scale, 16)


def test_eight_bits(device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x, scale = torch.randn(2, 33, 64, generator=generator), torch.tensor([0.012, 0.02])
    found = codes_between(x, scale, device, block=32, bound=127)
    check(found, x, scale, 32, bound=127)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_round_to_even(dtype: torch.dtype, device: str) -> None:
    x = (torch.arange(-8, 8).to(torch.float32) + 0.5).to(dtype).view(1, 1, 16)
    found = codes_between(x, torch.ones(1), device, block=1)
    assert found.flatten().tolist() == [-7, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 7]


def test_the_rotation_changes_the_codes(device: str) -> None:
    generator = torch.Generator().manual_seed(6)
    x, scale = torch.randn(1, 9, 64, generator=generator), torch.tensor([0.3])
    rotations = [(1, False), (32, False), (64, False), (32, True), (64, True)]
    found = [codes_between(x, scale, device, block=block, regular=regular) for block, regular in rotations]
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_an_empty_batch(device: str) -> None:
    x = torch.empty(0, 4, 32, device=device)
    assert hadamard_quantize(x, torch.empty(0, device=device), low=-7, high=7, block=32).shape == (0, 4, 32)
