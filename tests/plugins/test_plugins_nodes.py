"""What a plugin node takes, gives and launches: formats, sizes, grids, refusals."""

import math
import re
from typing import Any

import pytest

from hqc.plugins.hqc_qdp.nodes import OPS, ConvVariant, HadamardVariant, LinearVariant
from hqc.plugins.hqc_qdp.problems import PluginError

HADAMARD = {"block": 32, "low": -7, "high": 7, "channel_axis": 1, "regular": 0}
CONV = {"block": 32, "kernel": 3, "stride": 2, "padding": 1, "out_type": 10, "regular": 0}
LINEAR = {"block": 32, "out_type": 16, "regular": 0}


def ceil_div(size: int, divisor: int) -> int:
    return math.ceil(size / divisor)


def test_an_image_is_read_as_it_lies_or_with_channels_last() -> None:
    choices = OPS["HadamardQuantize"].choices([(-1, 64, 8, 8), (-1,)], "fp16", HADAMARD)
    assert [choice.formats for choice in choices] == [("LINEAR", "LINEAR", "HWC16"), ("HWC8", "LINEAR", "HWC16")]
    assert [choice.types for choice in choices] == [("fp16", "fp32", "int8")] * 2
    assert len({choice.variant.key for choice in choices}) == 2


@pytest.mark.parametrize(("dtype", "layout"), [("fp16", "HWC8"), ("bf16", "HWC8"), ("fp32", "HWC")])
def test_channels_last_has_a_name_for_every_type(dtype: str, layout: str) -> None:
    choices = OPS["HadamardQuantize"].choices([(-1, 64, 8, 8), (-1,)], dtype, HADAMARD)
    assert choices[1].formats[0] == layout


@pytest.mark.parametrize("axis", [-1, 2])
def test_tokens_lie_as_they_are(axis: int) -> None:
    attributes = {**HADAMARD, "channel_axis": axis}
    attributes |= {"block": 8}
    (choice,) = OPS["HadamardQuantize"].choices([(-1, 77, 24), (-1,)], "fp32", attributes)
    assert choice.formats == ("LINEAR", "LINEAR", "LINEAR")
    assert choice.variant.key == "HadamardQuantize fp32 tokens channels=24 block=8 low=-7 high=7"


def test_a_regular_rotation_has_kernels_of_its_own() -> None:
    attributes = {**HADAMARD, "channel_axis": -1, "block": 64}
    keys = [
        OPS["HadamardQuantize"].choices([(-1, 77, 64), (-1,)], "fp32", {**attributes, "regular": kind})[0].variant.key
        for kind in (0, 1)
    ]
    assert keys == [
        "HadamardQuantize fp32 tokens channels=64 block=64 low=-7 high=7",
        "HadamardQuantize fp32 tokens channels=64 block=64 regular low=-7 high=7",
    ]
    dims = [(-1, 77, 64), (5, 32), (5,), (-1,), (5,)]
    for kind, name in ((0, "block=32"), (1, "block=32 regular")):
        (choice,) = OPS["Int4Linear"].choices(dims, "int8", {**LINEAR, "regular": kind})
        assert choice.variant.key == f"Int4Linear bf16 channels=64 outputs=5 {name}"


@pytest.mark.parametrize(("axis", "layouts"), [(1, ["nchw", "nhwc"]), (-1, ["tokens"])])
def test_bounds_of_every_sample_run_as_bounds_of_the_node_do(axis: int, layouts: list[str]) -> None:
    sizes = (-1, 64, 8, 8) if axis == 1 else (-1, 77, 64)
    attributes = {"block": 32, "channel_axis": axis, "regular": 0}
    found = OPS["HadamardQuantizeBounded"].choices([sizes, (-1, 3)], "fp16", attributes)
    other = OPS["HadamardQuantize"].choices([sizes, (-1,)], "fp16", {**HADAMARD, "channel_axis": axis})
    assert [(c.types, c.formats) for c in found] == [(c.types, c.formats) for c in other]
    keys = [f"HadamardQuantizeBounded fp16 {layout} channels=64 block=32" for layout in layouts]
    assert [choice.variant.key for choice in found] == keys
    assert OPS["HadamardQuantizeBounded"].output([sizes, (-1, 3)], attributes) == (sizes, "int8")


def test_products_name_every_operand_of_the_node() -> None:
    dims = [(-1, 64, 9, 7), (96, 288), (96,), (-1,), (96,)]
    (conv,) = OPS["Int4Conv"].choices(dims, "int8", CONV)
    assert conv.formats == ("HWC16", "LINEAR", "LINEAR", "LINEAR", "LINEAR", "HWC8")
    assert conv.types == ("int8", "int8", "fp32", "fp32", "fp32", "fp16")
    assert OPS["Int4Conv"].output(dims, CONV) == ((-1, 96, 5, 4), "fp16")
    dims = [(-1, 77, 64), (5, 32), (5,), (-1,), (5,)]
    (linear,) = OPS["Int4Linear"].choices(dims, "int8", LINEAR)
    assert linear.formats == ("LINEAR",) * 6
    assert OPS["Int4Linear"].output(dims, LINEAR) == ((-1, 77, 5), "bf16")


@pytest.mark.parametrize(
    ("op", "dims", "dtype", "attributes", "text"),
    [
        (
            "HadamardQuantize",
            [(-1, 24, 8, 8), (-1,)],
            "fp16",
            {**HADAMARD, "block": 8},
            "24 channels do not fill HWC16",
        ),
        (
            "HadamardQuantize",
            [(-1, 77, 48), (-1,)],
            "fp16",
            {**HADAMARD, "channel_axis": -1},
            "48 channels are not whole",
        ),
        (
            "HadamardQuantize",
            [(-1, 64, 8, 8), (-1,)],
            "fp16",
            {**HADAMARD, "block": 8, "regular": 1},
            "no kernel rotates in blocks of 8 of kind 1",
        ),
        ("Int4Linear", [(-1, 128), (8, 64)], "int8", {**LINEAR, "regular": 2}, "no kernel rotates in blocks of 32 of"),
        ("HadamardQuantize", [(-1, -1, 8, 8), (-1,)], "fp16", HADAMARD, "the number of channels is not known"),
        ("HadamardQuantize", [(-1, 64, 8), (-1,)], "fp16", HADAMARD, "channel_axis is 1 of 3"),
        ("HadamardQuantizeBounded", [(-1, 64, 8, 8), (-1,)], "fp16", HADAMARD, "step is not [N, 3]"),
        ("HadamardQuantizeBounded", [(-1, 64, 8, 8), (-1, 2)], "fp16", HADAMARD, "step is not [N, 3]"),
        ("HadamardQuantizeBounded", [(-1, 64, 8), (-1, 3)], "fp16", HADAMARD, "channel_axis is 1 of 3"),
        ("Int4Linear", [(-1, 64), (8, 32)], "fp16", LINEAR, "the codes are fp16, expected int8"),
        ("Int4Linear", [(-1, 64), (8, 16)], "int8", LINEAR, "64 channels meet weights of 32"),
        ("Int4Linear", [(-1, 64), (8, 32)], "int8", {**LINEAR, "out_type": 11}, "out_type is 11"),
        ("Int4Conv", [(-1, 64, 8, 8), (96, 32)], "int8", CONV, "a window of 64 channels and side 3"),
        ("Int4Conv", [(-1, 24, 8, 8), (96, 108)], "int8", {**CONV, "block": 8}, "24 channels do not fill HWC16"),
        ("Int4Conv", [(-1, 64, 8, 8), (4, 288)], "int8", CONV, "4 channels do not fill HWC8"),
    ],
)
def test_what_no_kernel_takes_is_refused_by_name(
    op: str, dims: list[Any], dtype: str, attributes: dict[str, int], text: str
) -> None:
    with pytest.raises(PluginError, match=re.escape(text)) as caught:
        OPS[op].choices(dims, dtype, attributes)
    assert str(caught.value).startswith(f"{op}: ")
    assert "\n" not in str(caught.value)


def test_a_product_in_float32_needs_no_full_vector() -> None:
    dims = [(-1, 64, 8, 8), (4, 288), (4,), (-1,), (4,)]
    (choice,) = OPS["Int4Conv"].choices(dims, "int8", {**CONV, "out_type": 1})
    assert choice.formats[-1] == "HWC"


# ---- launches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(1, 64), (16, 64), (64, 128)])
@pytest.mark.parametrize(
    ("layout", "dims"),
    [
        ("tokens", (3, 7, 96)),
        ("tokens", (5, 96)),
        ("nhwc", (3, 96, 5, 7)),
        ("nchw", (3, 96, 5, 7)),
        ("nchw", (1, 96, 8, 8)),
    ],
)
def test_a_rotations_grid_covers_everything_once(layout: str, dims: tuple[int, ...], tile: tuple[int, int]) -> None:
    variant = HadamardVariant("fp16", layout, 96, 32, -7, 7)
    launch = variant.launch(dims, tile, ceil_div)
    pixels = math.prod(dims) // dims[0] // 96
    if layout == "nchw":
        assert launch.integers == (96, pixels)
        assert launch.grid[2] == dims[0]
        columns, rows, extent = launch.grid[0], launch.grid[1], pixels
    else:
        assert launch.integers == (dims[0] * pixels, 96, pixels)
        assert launch.grid[2] == 1
        rows, columns, extent = launch.grid[0], launch.grid[1], dims[0] * pixels
    assert (rows - 1) * tile[0] < extent <= rows * tile[0]
    assert (columns - 1) * tile[1] < 96 <= columns * tile[1]


@pytest.mark.parametrize("tile", [(128, 128), (32, 32)])
def test_a_products_grid_covers_everything_once(tile: tuple[int, int]) -> None:
    launch = LinearVariant("fp16", 64, 96, 32).launch((3, 7, 11, 64), tile, ceil_div)
    assert launch.integers == (231, 64, 96, 77)
    assert launch.grid == (math.ceil(231 / tile[0]) * math.ceil(96 / tile[1]), 1, 1)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "places"),
    [(3, 1, 1, (9, 7)), (3, 2, 1, (5, 4)), (1, 1, 0, (9, 7)), (1, 2, 0, (5, 4))],
)
def test_a_convolution_is_launched_for_its_output(
    kernel: int, stride: int, padding: int, places: tuple[int, int]
) -> None:
    variant = ConvVariant("fp16", 64, 96, 32, kernel, stride, padding)
    launch = variant.launch((2, 64, 9, 7), (32, 32), ceil_div)
    rows = 2 * math.prod(places)
    assert launch.integers == (rows, 9, 7, 64, 96, *places)
    assert launch.grid == (math.ceil(rows / 32) * 3, 1, 1)


def test_a_matrix_of_one_row_a_sample_has_one_row_a_sample() -> None:
    assert LinearVariant("fp16", 64, 96, 1).launch((5, 64), (32, 32), ceil_div).integers == (5, 64, 96, 1)
