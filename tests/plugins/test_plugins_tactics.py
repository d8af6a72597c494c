"""The kernels that variants may run: what their tiles promise."""

from dataclasses import replace

import pytest

from hqc.kernels.cards import H100
from hqc.kernels.compile import compile_kernel
from hqc.kernels.options import ConvOptions, GemmOptions, HadamardOptions
from hqc.kernels.tiles import product_tile
from hqc.plugins.hqc_qdp.nodes import ConvVariant, HadamardVariant, LinearVariant, Variant
from hqc.plugins.tactics import tactics
from hqc.plugins.writing import MAX_SHARED_BYTES, _fitting

pytest.importorskip("triton")


@pytest.mark.parametrize(("channels", "block"), [(64, 32), (48, 16), (96, 1), (256, 256)])
def test_from_nchw_the_butterfly_stays_within_a_warp(channels: int, block: int) -> None:
    """Two warps would exchange half the tile through shared memory for one stage."""
    found = tactics(HadamardVariant("fp16", "nchw", channels, block, -7, 7), [64])
    assert found
    for tactic in found:
        options = tactic.options
        assert isinstance(options, HadamardOptions)
        assert options.num_warps == 1
        kernel = compile_kernel(tactic.kernel, tactic.dtype, tactic.plain_options(), "sm_90")
        assert kernel.spills == 0
        assert "bar.sync" not in kernel.ptx


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "variant",
    [
        ConvVariant("fp16", 192, 192, 32, 3, 1, 1),
        LinearVariant("fp16", 384, 384, 1),
        LinearVariant("fp16", 960, 960, 64),
        LinearVariant("fp16", 256, 512, 256),
    ],
    ids=lambda variant: variant.key,
)
def test_products_stay_in_registers_and_in_every_launchs_shared_memory(variant: Variant, arch: str) -> None:
    for tactic in tactics(variant, [4096]):
        compiled = _fitting(tactic, arch)
        assert compiled.spills == 0
        assert compiled.options.num_stages == tactic.options.num_stages


def test_products_have_the_tiles_of_the_kernels_for_large_and_small_batches() -> None:
    card = replace(H100, shared_bytes=MAX_SHARED_BYTES)
    found = [tactic.options for tactic in tactics(ConvVariant("fp16", 192, 192, 32, 3, 1, 1), [1024, 4096])]
    for options, batch in zip(found, (32, 1), strict=False):
        assert isinstance(options, ConvOptions)
        tile = product_tile(4096 * batch, 192, 192, taps=9, rotation=32, card=card, unsplit=True)
        assert (options.tile_rows, options.tile_outputs, options.tile_channels) == (
            tile.rows,
            tile.outputs,
            tile.channels,
        )
        assert (options.num_warps, options.num_stages, options.splits) == (tile.num_warps, tile.num_stages, 1)


@pytest.mark.parametrize("channels", [4, 45, 64, 192, 256, 960])
@pytest.mark.parametrize("outputs", [3, 192, 3072])
@pytest.mark.parametrize("places", [1, 64, 4096])
def test_every_variant_has_different_kernels(channels: int, outputs: int, places: int) -> None:
    for block in (b for b in (1, 16, 64, 256) if channels % b == 0):
        for variant in (
            LinearVariant("fp16", channels, outputs, block),
            ConvVariant("fp16", channels, outputs, block, 3, 2, 1),
        ):
            found = tactics(variant, [places])
            assert (1 if block == 256 else 2) <= len(found) <= 3
            options = [t.options for t in found if isinstance(t.options, GemmOptions)]
            assert len({(t.tile_rows, t.tile_outputs, t.tile_channels) for t in options}) == len(found)
