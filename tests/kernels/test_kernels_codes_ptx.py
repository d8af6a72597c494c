"""What a stored code comes from: an integer instruction, in every kernel that quantises.

Registers have no type in PTX. Where a byte is stored, or cut off, from the very register that a float addition wrote,
ptxas 12.8 to 13.0 converts a float to u8 (F2IP) instead of taking the lowest byte.
"""

import re

import pytest

from hqc.kernels.compile import compile_kernel

pytest.importorskip("triton")

CASES = [
    ("hadamard_quantize", {"layout": "nchw", "tile_rows": 16, "tile_channels": 32, "num_warps": 1}),
    ("hadamard_quantize", {"layout": "nchw", "tile_rows": 16, "tile_channels": 64, "num_warps": 1}),
    ("hadamard_quantize", {"tile_rows": 8, "num_warps": 1}),
    ("group_norm_quantize", {"tile_rows": 8, "num_warps": 1}),
    ("layer_norm_quantize", {"tile_rows": 1, "tile_channels": 64, "num_warps": 1}),
    ("gate_quantize", {"tile_rows": 4, "tile_channels": 64, "num_warps": 1}),
    ("hadamard_quantize", {"tile_rows": 8, "num_warps": 1, "low": None, "high": None}),
    ("group_norm_quantize", {"tile_rows": 8, "num_warps": 1, "low": None, "high": None}),
    ("int_gemm", {"codes": True, "block": 16, "low": None, "high": None}),
]


def sources_of_bytes(ptx: str) -> set[str]:
    """Instructions that wrote the registers which bytes are cut off or stored from."""
    made = {register: name for name, register in re.findall(r"^\s*([a-z][\w.]*)\s+(%r\d+),", ptx, re.MULTILINE)}
    read = re.findall(r"^\s*cvt\.[su](?:8|16)\.[su]32\s+%rs\d+, (%r\d+)", ptx, re.MULTILINE)
    read += re.findall(r"^\s*(?:@%p\d+ )?st\.[\w.]*b8\s+\[[^\]]*\], \{?\s*(%r\d+)", ptx, re.MULTILINE)
    read += [r for pair in re.findall(r"^\s*prmt\.b32\s+%r\d+, (%r\d+), (%r\d+)", ptx, re.MULTILINE) for r in pair]
    return {made[register] for register in read if register in made}


@pytest.mark.parametrize(("kernel", "options"), CASES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_bytes_come_from_integers(kernel: str, options: dict[str, object], arch: str) -> None:
    found = sources_of_bytes(compile_kernel(kernel, "fp16", options, arch).ptx)
    assert found
    assert not [name for name in found if name.endswith("f32")], found
