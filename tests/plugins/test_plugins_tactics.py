"""The kernels that variants may run: what their tiles promise."""

import pytest

from hqc.kernels.compile import compile_kernel
from hqc.kernels.options import HadamardOptions
from hqc.plugins.hqc_qdp.nodes import HadamardVariant
from hqc.plugins.tactics import tactics

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
        assert "fma." not in kernel.ptx
