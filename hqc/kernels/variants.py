"""Variants of the kernels that stand for the rest: what the compile table shows and what its test compiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hqc.kernels.compile import ARCHITECTURES, CompiledKernel, compile_kernel

__all__ = ["VARIANTS", "Variant", "row", "table"]

_COLUMNS = ("variant", "arch", "ptx", "instruction", "registers", "spills", "shared")


@dataclass(frozen=True)
class Variant:
    """A kernel with its options, under a name that says what it is for."""

    name: str
    kernel: str
    dtype: str = "fp16"
    options: Mapping[str, Any] = MappingProxyType({})

    def compile(self, arch: str) -> CompiledKernel:
        """For one architecture; see `compile_kernel`."""
        return compile_kernel(self.kernel, self.dtype, self.options, arch)


_DEEP = {"tile_channels": 128, "tile_outputs": 64}
VARIANTS: Sequence[Variant] = (
    Variant("rotate 32, rows, fp16 to int8", "hadamard_quantize"),
    Variant(
        "rotate 32, NCHW, fp16 to int8",
        "hadamard_quantize",
        options={"layout": "nchw", "tile_channels": 32, "num_warps": 1},
    ),
    Variant(
        "rotate 128, rows, fp32 to int4",
        "hadamard_quantize",
        "fp32",
        {"block": 128, "packed": True, "tile_rows": 32, "tile_channels": 128},
    ),
    Variant("GEMM, int8 weight", "int_gemm", options={"num_stages": 4}),
    Variant("GEMM, two digits", "int_gemm", options={"two_digits": True, "tile_outputs": 64}),
    Variant("GEMM, int4 weight, rotate 32", "int_gemm", options={"form": "words", "rotation": 32}),
    Variant("GEMM, int4 weight, rotate 128", "int_gemm", options={"form": "words", "rotation": 128, **_DEEP}),
    Variant("conv 3x3, int8 weight, residual, SiLU", "int_conv2d", options={"residual": True, "silu": True}),
    Variant(
        "conv 3x3 stride 2, int4 weight, rotate 32",
        "int_conv2d",
        options={"form": "words", "rotation": 32, "stride": (2, 2)},
    ),
    Variant(
        "conv 3x3, int8 weight, 4 channels",
        "int_conv2d",
        options={
            "even": False,
            "aligned": False,
            "tile_rows": 64,
            "tile_outputs": 64,
            "tile_channels": 32,
            "num_warps": 4,
        },
    ),
)


def row(variant: Variant, arch: str) -> dict[str, str | int]:
    """What the compiler says of a variant on an architecture: plain data."""
    compiled = variant.compile(arch)
    return {
        "variant": variant.name,
        "kernel": compiled.options.function,
        "arch": arch,
        "ptx": compiled.ptx_version,
        "instruction": compiled.instruction,
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared": compiled.shared_bytes,
        "warps": compiled.num_warps,
    }


def rows(architectures: Sequence[str] = ARCHITECTURES) -> list[dict[str, str | int]]:
    """Every variant on every architecture."""
    return [row(variant, arch) for variant in VARIANTS for arch in architectures]


def table(found: Sequence[Mapping[str, str | int]]) -> str:
    """Markdown: one line a variant and architecture."""
    lines = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)]
    lines += [" | ".join(str(line[c]) or "–" for c in _COLUMNS) for line in found]
    return "\n".join(f"| {line} |" for line in lines)
