"""Integer operators against numpy int64: written out as loops, no shared code."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.ops import digit, half, int_conv2d, int_linear, nearest_timestep, pack_int4, rescale, rotate_codes, unpack_int4
from hqc.ops.weight_codes import fits_int4, int4_offsets

relaxed = settings(deadline=None, derandomize=True, max_examples=40)


def sylvester64(order: int) -> np.ndarray:
    """H[i, j] = (-1)^popcount(i & j): the closed form, not the recursion."""
    return np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(order)] for i in range(order)], dtype=np.int64)


def conv64(q: np.ndarray, w: np.ndarray, stride: list[int], padding: list[int], dilation: list[int]) -> np.ndarray:
    """Convolution by definition in int64: one multiply-add a loop iteration over taps."""
    n, _, height, width = q.shape
    o, _, kh, kw = w.shape
    oh = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    out = np.zeros((n, o, oh, ow), dtype=np.int64)
    for y in range(oh):
        for x in range(ow):
            for dy in range(kh):
                for dx in range(kw):
                    row, col = (
                        y * stride[0] - padding[0] + dy * dilation[0],
                        x * stride[1] - padding[1] + dx * dilation[1],
                    )
                    if 0 <= row < height and 0 <= col < width:
                        out[:, :, y, x] += q[:, :, row, col].astype(np.int64) @ w[:, :, dy, dx].astype(np.int64).T
    return out


@relaxed
@given(
    block=st.sampled_from([8, 16, 32, 64, 128]),
    groups=st.integers(1, 2),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (1, 3)]),
    extreme=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rotate_codes_is_exact(block: int, groups: int, kernel: tuple[int, ...], extreme: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (3, groups * block, *kernel)
    codes = np.full(shape, -128) if extreme else rng.integers(-128, 128, shape)
    blocks = codes.astype(np.int64).reshape(3, groups, block, -1)
    expected = np.einsum("ij,ogjk->ogik", sylvester64(block), blocks).reshape(shape)
    assert np.abs(expected).max() <= 128 * block
    found = rotate_codes(torch.from_numpy(codes.astype(np.int8)), block)
    assert found.dtype == torch.int16
    assert np.array_equal(found.numpy(), expected)


def test_halves_are_exact_for_every_int8_code() -> None:
    values = torch.arange(-128, 128, dtype=torch.int16)
    lower, upper = half(values, 0), half(values, 1)
    assert torch.equal(lower.to(torch.int16) + upper, values)
    assert int(torch.cat([lower, upper]).abs().max()) == 64


def test_digits_are_exact_for_every_value_that_can_occur() -> None:
    # A block of 64 reaches 128·64 = 8 192; a block of 128 may reach 16 384, which `split_digits` refuses.
    values = torch.arange(-16_448, 16_320, dtype=torch.int16)
    low, high = digit(values, 0), digit(values, 1)
    assert low.dtype == high.dtype == torch.int8
    assert int(low.min()) == -64
    assert int(low.max()) == 63
    assert torch.equal(low.to(torch.int32) + 128 * high.to(torch.int32), values.to(torch.int32))


@pytest.mark.parametrize("beyond", [16_320, -16_449])
def test_digits_fail_one_step_beyond_the_documented_bounds(beyond: int) -> None:
    code = torch.tensor([beyond], dtype=torch.int16)
    assert 128 * int(digit(code, 1)) + int(digit(code, 0)) != beyond


@relaxed
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_pack_and_unpack_give_back_every_code(shape: list[int], seed: int) -> None:
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (codes.numel() + 1) // 2
    assert torch.equal(unpack_int4(packed, shape), codes)


@given(st.integers(-128, 127), st.integers(0, 255), st.integers(0, 2**16))
def test_offsets_leave_four_bits_wherever_sixteen_numbers_lie(low: int, span: int, seed: int) -> None:
    high = min(127, low + span)
    between = torch.randint(low, high + 1, (3, 4), generator=torch.Generator().manual_seed(seed))
    codes = torch.cat([torch.tensor([[low, high]] * 3), between], 1).to(torch.int8).view(3, 2, 3)
    offsets, fits = int4_offsets(codes)
    assert offsets.dtype == torch.int8
    assert fits.tolist() == [high - low <= 15] * 3
    if bool(fits.all()):
        left = codes - offsets.view(3, 1, 1)
        assert left.to(torch.int64).equal(codes.to(torch.int64) - offsets.to(torch.int64).view(3, 1, 1))
        assert fits_int4(left)


def test_the_first_code_is_the_low_nibble() -> None:
    assert pack_int4(torch.tensor([1, -1, -8], dtype=torch.int8)).tolist() == [0xF1, 0x08]


@pytest.mark.parametrize("bad", [-9, 8, 127, -128])
def test_codes_that_do_not_fit_four_bits_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="expected -8…7"):
        pack_int4(torch.tensor([0, bad], dtype=torch.int8))


@relaxed
@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 5),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_int_linear_is_exact(lead: list[int], inputs: int, outputs: int, wide: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, (*lead, inputs)).astype(np.int8)
    bound = 16_320 if wide else 127
    w = rng.integers(-bound, bound + 1, (outputs, inputs)).astype(np.int16 if wide else np.int8)
    expected = np.zeros((*lead, outputs), dtype=np.int64)
    for c in range(inputs):
        expected += q[..., c, None].astype(np.int64) * w[:, c].astype(np.int64)
    found = int_linear(torch.from_numpy(q), torch.from_numpy(w), 127)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), expected)


def test_int_linear_is_exact_at_the_edge_of_int32() -> None:
    q = torch.full((1, 1036), 127, dtype=torch.int8)
    w = torch.full((1, 1036), 16_320, dtype=torch.int16)
    w[0, 0] = 16_319  # an odd sum beyond 2^24: float32 would round it
    assert int_linear(q, w, 127).item() == 127 * (1035 * 16_320 + 16_319) < 2**31


@relaxed
@given(
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_int_conv2d_is_exact(
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    kernel: tuple[int, int],
    wide: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, (2, 9, 7, 6)).astype(np.int8)
    bound = 16_320 if wide else 127
    w = rng.integers(-bound, bound + 1, (4, 9, *kernel)).astype(np.int16 if wide else np.int8)
    expected = conv64(q, w, list(stride), list(padding), list(dilation))
    found = int_conv2d(torch.from_numpy(q), torch.from_numpy(w), list(stride), list(padding), list(dilation), 127)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(("shape", "axis"), [((2, 3), -1), ((2, 4, 3), -1), ((2, 3, 4, 5), 1)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_rescale_multiplies_weight_scale_then_activation_scale_then_adds(
    shape: tuple[int, ...], axis: int, with_bias: bool
) -> None:
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**30), 2**30, shape).astype(np.int32)
    scale_a, scale_w = rng.random(2).astype(np.float32), rng.random(3).astype(np.float32)
    bias = rng.standard_normal(3).astype(np.float32)
    channels = [1] * len(shape)
    channels[axis] = -1
    expected = acc.astype(np.float32) * scale_w.reshape(channels) * scale_a.reshape(-1, *[1] * (len(shape) - 1))
    expected = expected + bias.reshape(channels) if with_bias else expected
    kept = torch.from_numpy(acc.copy())
    found = rescale(
        kept, torch.from_numpy(scale_a), torch.from_numpy(scale_w), torch.from_numpy(bias) if with_bias else None, axis
    )
    assert expected.dtype == np.float32
    assert np.array_equal(found.numpy(), expected)
    assert np.array_equal(kept.numpy(), acc), "the accumulator was overwritten"


@relaxed
@given(
    grid=st.lists(st.integers(0, 999), min_size=1, max_size=20, unique=True),
    times=st.lists(st.floats(-100, 1200, width=32), min_size=1, max_size=8),
    ties=st.booleans(),
)
def test_nearest_timestep_is_the_first_of_the_nearest(grid: list[int], times: list[float], ties: bool) -> None:
    if ties and len(grid) > 1:
        ordered = sorted(grid)
        times = [*times, (ordered[0] + ordered[1]) / 2]
    expected = []
    for t in times:
        distances = [abs(np.float32(t) - np.float32(g)) for g in grid]
        expected.append(distances.index(min(distances)))
    found = nearest_timestep(torch.tensor(times, dtype=torch.float32), torch.tensor(grid, dtype=torch.float32))
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_a_tie_takes_the_first_row_in_either_order() -> None:
    assert nearest_timestep(torch.tensor([50.0]), torch.tensor([0.0, 100.0])).tolist() == [0]
    assert nearest_timestep(torch.tensor([50.0]), torch.tensor([100.0, 0.0])).tolist() == [0]


def test_integer_timesteps_are_taken() -> None:
    assert nearest_timestep(torch.tensor([0, 77, 999]), torch.tensor([999.0, 80.0, 1.0])).tolist() == [2, 1, 0]
