"""Quantisers with a scale a group of channels: loops in numpy, groups of zeros, NaN, what files may say."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hqc.operators import RULES
from hqc.ops import dequantize_grouped, dynamic_scale, fake_quantize_grouped, quantize_grouped
from hqc.ops.grouped import LEAST_REACH, group_count

Array = NDArray[np.float32]
CASES = [
    pytest.param((3, 128), -1, 64, id="vector"),
    pytest.param((2, 5, 96), -1, 64, id="tokens, last group shorter"),
    pytest.param((2, 8, 3, 4), 1, 4, id="image"),
    pytest.param((2, 10, 3, 1), 1, 4, id="image, last group shorter"),
    pytest.param((4, 3, 2, 2), 1, 64, id="fewer channels than a group"),
]


def reference(x: Array, qmin: int, qmax: int, axis: int, group: int) -> tuple[Array, Array, Array]:
    """Scales, codes and reals of dynamic groups, group by group in float32; scales of every channel."""
    channels_last = np.moveaxis(x, axis, -1)
    scales, codes = np.empty_like(channels_last), np.empty_like(channels_last)
    for place in np.ndindex(*channels_last.shape[:-1]):
        for start in range(0, channels_last.shape[-1], group):
            values = channels_last[place][start : start + group]
            largest = np.max(np.abs(values))
            scale = np.float32(np.maximum(largest, np.float32(2.0**-100)) / np.float32(qmax))
            inverse = np.float32(1) / scale
            scales[place][start : start + group] = scale
            codes[place][start : start + group] = np.clip(np.rint(values * inverse), qmin, qmax)
    back = (np.moveaxis(scales, -1, axis), np.moveaxis(codes, -1, axis))
    return back[0], back[1], back[0] * back[1]


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Of very different size by channel."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[1]).view(-1, *[1] * (len(shape) - 2))


@pytest.mark.parametrize(("shape", "axis", "group"), CASES)
@pytest.mark.parametrize("top", [1, 7, 127])
def test_dynamic_groups_are_those_of_loops(shape: tuple[int, ...], axis: int, group: int, top: int) -> None:
    x = values(*shape)
    scale = dynamic_scale(x, top, axis, group)
    wanted, codes, reals = reference(x.numpy(), -top, top, axis, group)
    size = list(shape)
    size[axis] = group_count(shape[axis], group)
    assert list(scale.shape) == size
    firsts = np.take(wanted, range(0, shape[axis], group), axis)
    np.testing.assert_array_equal(scale.numpy(), firsts)
    found = quantize_grouped(x, scale, -top, top, axis, group)
    assert found.dtype == torch.int8
    np.testing.assert_array_equal(found.numpy(), codes)
    np.testing.assert_array_equal(fake_quantize_grouped(x, scale, -top, top, axis, group).numpy(), reals)
    np.testing.assert_array_equal(dequantize_grouped(found, scale, axis, group).numpy(), reals)


@pytest.mark.parametrize(("shape", "axis", "group"), CASES)
def test_stored_scales_clip(shape: tuple[int, ...], axis: int, group: int) -> None:
    """A weight's scales may be smaller than its values need; every channel takes the scale of its group."""
    x, count = values(*shape, seed=1), group_count(shape[axis], group)
    size = list(shape)
    size[axis] = count
    scale = 0.1 + torch.rand(size, generator=torch.Generator().manual_seed(2))
    channels = torch.arange(shape[axis]) // group
    wide = scale.index_select(axis % len(shape), channels).numpy().astype(np.float64)
    levels = x.numpy() * (np.float32(1) / wide.astype(np.float32))
    codes = np.clip(np.rint(levels), -8, 7)
    np.testing.assert_array_equal(quantize_grouped(x, scale, -8, 7, axis, group).numpy(), codes)
    found = fake_quantize_grouped(x, scale, -8, 7, axis, group).numpy()
    np.testing.assert_allclose(found, codes * wide, rtol=1e-6)
    assert codes.min() == -8
    assert codes.max() == 7


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 2.0**-110])
def test_a_group_of_nothing_stays_nothing(tiny: float) -> None:
    x = torch.tensor([[tiny, -tiny, 3.0, 1.0]])
    scale = dynamic_scale(x, 7, -1, 2)
    assert scale[0, 0] == np.float32(LEAST_REACH) / np.float32(7)
    assert bool(scale.reciprocal().isfinite().all())
    found = fake_quantize_grouped(x, scale, -7, 7, -1, 2)
    assert torch.equal(found[0, :2], torch.zeros(2))
    torch.testing.assert_close(found[0, 2:], torch.tensor([3.0, 2 * 3.0 / 7]))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_own_group_alone(wrong: float) -> None:
    x = torch.tensor([[wrong, 1.0, 3.0, 1.0]])
    found = fake_quantize_grouped(x, dynamic_scale(x, 7, -1, 2), -7, 7, -1, 2)
    assert bool(found[0, :2].isnan().all())
    assert bool(found[0, 2:].isfinite().all())


def test_the_largest_value_of_a_group_is_kept() -> None:
    x = values(6, 64)
    found = fake_quantize_grouped(x, dynamic_scale(x, 7, -1, 16), -7, 7, -1, 16)
    places = x.view(6, 4, 16).abs().argmax(2, keepdim=True)
    torch.testing.assert_close(*(one.view(6, 4, 16).gather(2, places) for one in (found, x)), rtol=1e-6, atol=0)


X = torch.zeros(2, 10, 3, 3)
SAID = [
    ({"axis": 2}, "groups axis 2 of 4; expected 1 or the last"),
    ({"group": 0}, "has groups of 0"),
    ({"group": 2**40}, f"has groups of {2**40}"),
    ({"qmin": 8, "qmax": 7}, "has codes 8…7; expected some of -128…127"),
    ({"qmax": 128}, "has codes -8…128; expected some of -128…127"),
    ({"scale": torch.ones(2)}, "has scales [2] for groups of 4 of [2, 10, 3, 3]; expected [2, 3, 3, 3]"),
    ({"x": X.to(torch.int64)}, "quantises whole numbers"),
]


@pytest.mark.parametrize(("changed", "said"), SAID)
def test_calls_that_a_file_may_not_make(changed: dict[str, object], said: str) -> None:
    given = {"x": X, "scale": torch.ones(2, 3, 3, 3), "qmin": -8, "qmax": 7, "axis": 1, "group": 4}
    for name in ("fake_quantize_grouped", "quantize_grouped"):
        rule = RULES[f"hqc.{name}.default"]
        assert rule(given) == ""
        assert rule({**given, **changed}) == said


def test_other_calls_that_a_file_may_not_make() -> None:
    measure, back = RULES["hqc.dynamic_scale.default"], RULES["hqc.dequantize_grouped.default"]
    given = {"x": X, "qmax": 7, "axis": 1, "group": 4}
    assert measure(given) == ""
    assert measure({**given, "x": X.to(torch.int8)}) == "measures whole numbers"
    assert measure({**given, "qmax": 0}) == "has codes up to 0; expected some of 1…127"
    assert measure({**given, "axis": 0}) == "groups axis 0 of 4; expected 1 or the last"
    stored = {"q": X.to(torch.int8), "scale": torch.ones(2, 3, 3, 3), "axis": 1, "group": 4}
    assert back(stored) == ""
    assert back({**stored, "q": X}) == "dequantises torch.float32"
    assert "expected [2, 2, 3, 3]" in back({**stored, "group": 5})
