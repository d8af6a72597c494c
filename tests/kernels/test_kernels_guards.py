"""What the launchers refuse and in which words; what needs no triton; the choice of tiles; packed weights."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hqc.errors import KernelError
from hqc.kernels import (
    Epilogue,
    GroupNorm,
    LayerNorm,
    Quantiser,
    Weight,
    channels_last,
    gate_quantize,
    group_norm_quantize,
    hadamard_quantize,
    int_conv2d,
    int_gemm,
    launching,
    layer_norm_quantize,
    pack_weight,
    packed_weight_fits,
    wide_attention,
)
from hqc.kernels.cards import H100
from hqc.kernels.options import GemmOptions, HadamardOptions
from hqc.kernels.tiles import hadamard_nchw_tile, hadamard_rows_tile, product_tile
from hqc.ops import pack_int4, rotate_codes, unpack_int4

LDM4 = [(8192, 192, 192), (8192, 1536, 192), (2048, 384, 384), (512, 576, 5184), (128, 960, 8640), (2, 768, 192)]
"""(rows, outputs, channels) of layers of LDM-4 at batch 2."""


def i8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def weight(*shape: int, **changes: Any) -> Weight:
    return Weight(**{"codes": i8(*shape), "scale": torch.ones(shape[0]), **changes})


X, ONE = torch.zeros(2, 5, 32), torch.ones(2)
CODES, IMAGE = i8(2, 5, 32), i8(2, 4, 4, 32)


def rotate(x: Tensor = X, scale: Tensor = ONE, **options: Any) -> Tensor:
    return hadamard_quantize(x, scale, **{"low": -7, "high": 7, "block": 32, **options})


LAUNCHERS = (
    "hadamard_quantize",
    "group_norm_quantize",
    "layer_norm_quantize",
    "gate_quantize",
    "wide_attention",
    "int_gemm",
    "int_conv2d",
)
HOW, PLAIN = Quantiser(ONE, -7, 7, 32), Quantiser(torch.ones(1), -7, 7)


def norm(how: GroupNorm = GroupNorm(4, 1e-5), **options: Any) -> object:  # noqa: B008  (frozen)
    return group_norm_quantize(X, how, HOW, **options)


def attend(**changes: Any) -> Tensor:
    parts = {name: torch.zeros(2, 5, 32, dtype=torch.float16) for name in "qkv"}
    return wide_attention(**{**parts, "heads": 1, **changes})


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: rotate(torch.zeros(4)), "x has 1 axes, expected [N, …, C]"),
    (lambda: rotate(torch.zeros(4, 32), nchw=True), "x has 2 axes, expected [N, C, …]"),
    (lambda: rotate(X.to(torch.float64)), "x is float64, expected float16 or bfloat16 or float32"),
    (lambda: rotate(X.permute(1, 0, 2)), "x has strides (32, 160, 1), expected contiguous"),
    (lambda: rotate(scale=torch.ones(3)), "inverse_scale has shape 3, expected 2"),
    (lambda: rotate(block=24), "block is 24, expected one of (1, 8, 16, 32, 64, 128, 256)"),
    (lambda: rotate(block=64), "x has 32 channels, expected a multiple of the block 64"),
    (lambda: rotate(torch.zeros(2, 5, 9), block=1, packed=True), "x has 9 channels, expected an even number"),
    (lambda: rotate(out=i8(2, 5, 16)), "out has shape 2×5×16, expected 2×5×32"),
    (lambda: rotate(out=torch.zeros(2, 5, 32)), "out is float32, expected int8"),
    (lambda: int_gemm(i8(32), weight(4, 32), ONE), "codes have 1 axes, expected […, C]"),
    (lambda: int_gemm(CODES.float(), weight(4, 32), ONE), "codes is float32, expected int8"),
    (lambda: int_gemm(CODES, weight(4, 33), ONE), "weight has shape 4×33, expected any×32"),
    (lambda: int_gemm(CODES, weight(4, 3, 3, 32), ONE), "weight has shape 4×3×3×32, expected any×32"),
    (lambda: int_gemm(CODES, weight(4, 32, scale=torch.ones(5)), ONE), "weight.scale has shape 5, expected 4"),
    (lambda: int_gemm(CODES, weight(4, 32, rotation=32), ONE), "an int8 weight comes with a rotation of 32"),
    (lambda: int_gemm(CODES, weight(4, 32, rotation=24), ONE), "the rotation is 24, expected one of"),
    (lambda: int_gemm(CODES, weight(4, 32, high=i8(4, 31)), ONE), "weight.high has shape 4×31, expected 4×32"),
    (
        lambda: int_gemm(CODES, weight(4, 32, codes=pack_weight(i8(4, 32)), rotation=64), ONE),
        "there are 32 channels, expected a multiple of the rotation 64",
    ),
    (
        lambda: int_gemm(CODES, weight(4, 32, codes=pack_weight(i8(4, 32)), high=i8(4, 16)), ONE),
        "a packed weight comes with a second digit, expected none",
    ),
    (lambda: int_gemm(CODES, weight(4, 32), torch.ones(3)), "10 rows belong to 3 scales"),
    (lambda: int_gemm(CODES, weight(4, 32), ONE, Epilogue(bias=torch.ones(3))), "bias has shape 3, expected 4"),
    (
        lambda: int_gemm(CODES, weight(4, 32), ONE, Epilogue(dtype=torch.int8)),
        "the dtype is torch.int8, expected float16",
    ),
    (
        lambda: int_gemm(CODES, weight(4, 32), ONE, Epilogue(residual=torch.zeros(2, 5, 4))),
        "residual is float32, expected float16",
    ),
    (lambda: int_conv2d(CODES, weight(4, 3, 3, 32), ONE), "codes has shape 2×5×32, expected any×any×any×any"),
    (lambda: int_conv2d(IMAGE, weight(4, 32), ONE), "the weight has 2 axes, expected [O, kh, kw, C]"),
    (lambda: int_conv2d(IMAGE, weight(4, 3, 3, 16), ONE), "weight has shape 4×3×3×16, expected any×3×3×32"),
    (lambda: int_conv2d(IMAGE, weight(4, 3, 3, 32), torch.ones(3)), "scale has shape 3, expected 2"),
    (lambda: int_conv2d(IMAGE, weight(4, 3, 3, 32), ONE, stride=(0, 1)), "stride is (0, 1), expected two sizes"),
    (lambda: int_conv2d(IMAGE, weight(4, 3, 3, 32), ONE, padding=(1,)), "padding is (1,), expected two sizes"),
    (lambda: int_conv2d(IMAGE, weight(4, 5, 5, 32), ONE), "an image of [4, 4] gives an output of [0, 0]"),
    (lambda: norm(GroupNorm(5, 1e-5)), "there are 5 groups, expected a divisor of 32"),
    (lambda: norm(GroupNorm(4, 1e-5, torch.ones(32))), "a weight or a bias comes alone, expected both or neither"),
    (lambda: norm(GroupNorm(4, 1e-5, torch.ones(8), torch.ones(8))), "weight has shape 8, expected 32"),
    (lambda: norm(second=torch.zeros(2, 4, 8)), "second has shape 2×4×8, expected 2×5×any"),
    (lambda: norm(beside=Quantiser(ONE, -7, 7, 64)), "x has 32 channels, expected a multiple of the block 64"),
    (lambda: layer_norm_quantize(torch.zeros(1, 32768), LayerNorm(1e-5), PLAIN), "rows have 32768 channels"),
    (lambda: gate_quantize(torch.zeros(2, 9), HOW, kind="gelu", gated=True), "x has 9 channels, expected two halves"),
    (
        lambda: int_gemm(CODES, weight(7, 32), ONE, Epilogue(gate="gelu")),
        "there are 7 outputs, expected pairs for a gate",
    ),
    (lambda: int_gemm(CODES, weight(8, 32), ONE, Epilogue(shift=torch.zeros(2, 7))), "shift has shape (2, 7)"),
    (lambda: int_gemm(CODES, weight(8, 32), ONE, Epilogue(quantiser=HOW)), "x has 8 channels, expected a multiple"),
    (lambda: int_conv2d(IMAGE, weight(8, 3, 3, 32), ONE, upsample=0), "upsample is 0, expected 1 or more"),
    (lambda: attend(k=torch.zeros(2, 5, 64).half()), "for 1 heads"),
    (lambda: attend(heads=5), "for 5 heads"),
    (lambda: attend(v=torch.zeros(2, 5, 32)), "expected one half"),
    (lambda: attend(q=torch.zeros(5, 32).half()), "q has 2 axes, expected [N, T, C]"),
    (lambda: attend(q=torch.zeros(2, 32, 5).half().mT), "expected rows one pitch apart"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(KernelError, match=re.escape(message)) as raised:
        call()
    assert str(raised.value).startswith(tuple(f"{name}: " for name in LAUNCHERS))
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors may be on a CUDA device here")
def test_a_tile_that_does_not_fit_the_card_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):
        pass

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: object, **settings: object) -> None:
                raise OutOfResources("out of resource: shared memory, Required: 115712, Hardware limit: 101376.")

            return launch

    module = SimpleNamespace(hadamard_quantize_rows=Kernel())
    monkeypatch.setattr(launching.importlib, "import_module", lambda name: module)
    with pytest.raises(KernelError, match=r"does not fit the card: .*Required: 115712") as raised:
        launching.launch_kernel("hadamard_quantize", HadamardOptions(), (1,), ())
    assert "\n" not in str(raised.value)


def test_the_cpu_is_refused_unless_kernels_are_interpreted() -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    with pytest.raises(KernelError, match=r"^hadamard_quantize: the tensors are on cpu, expected a CUDA device"):
        hadamard_quantize(torch.ones(1, 8), torch.ones(1), low=-7, high=7)


def test_triton_is_imported_on_use_only() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"  # importing it raises ImportError
        "import torch, hqc.kernels, hqc.kernels.compile\n"
        "hqc.kernels.pack_weight(torch.zeros(2, 4, dtype=torch.int8))\n"
        "for call in (lambda: hqc.kernels.hadamard_quantize(torch.ones(1, 8), torch.ones(1), low=-7, high=7),\n"
        "             lambda: hqc.kernels.compile.compile_kernel('int_gemm', 'fp16', {}, 'sm_80')):\n"
        "    try: call()\n"
        "    except hqc.errors.RuntimeMissingError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "hadamard_quantize: triton is not installed. Run `pip install 'hqc[gpu]'`.",
        "compile_kernel int_gemm for sm_80: triton is not installed. Run `pip install 'hqc[gpu]'`.",
    ]


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8), (3, 5), (2, 3, 3, 6), (2, 3, 3, 1)], ids=str)
def test_packed_lines(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_weight(codes)
    assert packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    lines = packed.view(-1, packed.shape[-1])
    unpacked = torch.stack([unpack_int4(line, [shape[-1]]) for line in lines])
    assert torch.equal(unpacked.view(shape), codes)
    if shape[-1] % 2 == 0:
        assert torch.equal(packed.flatten(), pack_int4(codes)), "even lines are what pack_int4 stores"


@pytest.mark.parametrize("bad", [-9, 8])
def test_codes_of_more_than_four_bits_are_not_packed(bad: int) -> None:
    with pytest.raises(ValueError, match=f"codes span {min(bad, 0)}…{max(bad, 0)}; expected -8…7"):
        pack_weight(torch.tensor([[0, bad]], dtype=torch.int8))


def test_which_packed_weights_fit() -> None:
    """|w·H| ≤ 127: sixteen codes of 7 give 112, of -8 give -128."""
    row = torch.full((1, 16), 7, dtype=torch.int8)
    assert int(rotate_codes(row, 16).abs().max()) == 112
    assert packed_weight_fits(row, 16)
    assert not packed_weight_fits(torch.full((1, 16), -8, dtype=torch.int8), 16)
    assert packed_weight_fits(torch.full((1, 16), -8, dtype=torch.int8), 1)
    assert not packed_weight_fits(torch.full((1, 32, 3, 3), 5, dtype=torch.int8), 32)


def test_the_largest_sums_of_all_do_not_fit() -> None:
    assert not packed_weight_fits(torch.full((1, 256), -8, dtype=torch.int8), 256)


def test_channels_last() -> None:
    oihw = torch.arange(24).view(2, 3, 2, 2)
    assert channels_last(oihw)[1, 0, 1, 2] == oihw[1, 2, 0, 1]
    assert channels_last(oihw).is_contiguous()
    assert torch.equal(channels_last(torch.eye(3)), torch.eye(3))


# ---- tiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "outputs", "channels"), LDM4)
@pytest.mark.parametrize("rotation", [1, 32, 64])
@pytest.mark.parametrize("two_digits", [False, True])
def test_products_are_tiled_within_shared_memory(
    rows: int, outputs: int, channels: int, rotation: int, two_digits: bool
) -> None:
    tile = product_tile(rows, outputs, channels, rotation=rotation, two_digits=two_digits)
    form = {"form": "words", "rotation": rotation} if rotation > 1 else {"two_digits": two_digits}
    GemmOptions(tile_rows=tile.rows, tile_outputs=tile.outputs, tile_channels=tile.channels, **form)
    assert (tile.rows + tile.outputs * (1 + two_digits)) * tile.channels * tile.num_stages <= 99 * 1024
    assert channels % tile.channels == 0


def test_large_layers_take_large_tiles_and_small_ones_fill_the_card() -> None:
    large, small = product_tile(8192 * 16, 1536, 192), product_tile(128, 960, 960, taps=9)
    assert (large.rows, large.outputs, large.splits) == (128, 128, 1)
    programs = -(-128 // small.rows) * -(-960 // small.outputs) * small.splits
    assert small.splits > 1
    assert programs >= 100, "of 132 multiprocessors"
    assert product_tile(8192, 192, 45).channels == 32, "channels read byte by byte"
    assert product_tile(128, 960, 960, taps=9, card=replace(H100, multiprocessors=16)).splits < small.splits, (
        "a smaller card"
    )


@pytest.mark.parametrize("block", [1, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [3, 48, 256, 320, 960])
def test_a_rotation_fits_its_tile(block: int, channels: int) -> None:
    for rows in (1, 77, 8192):
        tall, wide, warps = hadamard_rows_tile(rows, channels, block)
        HadamardOptions(block=block, tile_rows=tall, tile_channels=wide, num_warps=warps)
        assert tall * wide <= 64 * 32 * warps, "at most 64 elements a thread"
        pixels, wide, warps = hadamard_nchw_tile(rows, block)
        HadamardOptions(block=block, layout="nchw", tile_rows=pixels, tile_channels=wide, num_warps=warps)
        assert warps == 1, "the butterfly stays within a warp"
        assert pixels * wide <= 128 * 32


def test_a_rotation_of_a_large_tensor_is_not_cut_small() -> None:
    tiles = [np.prod(hadamard_rows_tile(rows, 192, 32)[:2]) for rows in (64, 8192 * 16)]
    assert tiles[0] < tiles[1] == 4096
