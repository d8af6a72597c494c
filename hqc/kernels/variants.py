"""Variants of the kernels that stand for the rest: what the compile table shows and what its test compiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hqc.kernels.compile import ARCHITECTURES, CompiledKernel, compile_kernel

__all__ = ["FUSED", "VARIANTS", "Variant", "row", "rows", "table"]


@dataclass(frozen=True)
class Variant:
    """A kernel with its options, under a name that says what it is for."""

    name: str
    kernel: str
    options: Mapping[str, Any]
    dtype: str = "fp16"

    def compile(self, arch: str) -> CompiledKernel:
        """For one architecture; see `compile_kernel`."""
        return compile_kernel(self.kernel, self.dtype, self.options, arch)


_NCHW = {"layout": "nchw", "tile_channels": 32, "num_warps": 1}
_WIDE = {"block": 128, "packed": True, "tile_rows": 32, "tile_channels": 128}
_INT4 = {"form": "words", "rotation": 32}
_REGULAR = {"block": 64, "regular": True}
_REGULAR_256 = {"rotation": 256, "regular_rotation": True, "tile_channels": 256}
_DEEPEST = {"form": "words", **_REGULAR_256, "tile_rows": 64, "tile_outputs": 64, "num_stages": 2}
_DEEP = {"form": "words", "rotation": 128, "tile_channels": 128, "tile_outputs": 64}
_FEW = {"even": False, "aligned": False, "tile_rows": 64, "tile_outputs": 64, "tile_channels": 32, "num_warps": 4}
_SMALL = {"tile_rows": 64, "tile_outputs": 64, "num_warps": 4}
_GEGLU = {"gate": "gelu", "codes": True, "block": 32, **_SMALL}
_MEASURED = {"residual": True, "statistics": True, "whole": True, **_SMALL}
_BESIDE = {"second": True, "beside": True, "beside_block": 32}
_HEADS = {"tile_rows": 64, "tile_keys": 64, "tile_channels": 64, "num_warps": 4}
FUSED: Sequence[Variant] = (
    Variant("group norm, SiLU, rotate 32", "group_norm_quantize", {}),
    Variant("group norm of two images, and their own codes", "group_norm_quantize", _BESIDE),
    Variant("statistics of two images, joined", "group_norm_affine", {"second": True}),
    Variant("layer norm, rotate 32", "layer_norm_quantize", {}),
    Variant("GEGLU, rotate 32", "gate_quantize", {}),
    Variant("GEMM, int8 weight, GEGLU, rotate 32", "int_gemm", _GEGLU),
    Variant("conv 3×3, int8 weight, residual, statistics", "int_conv2d", _MEASURED),
    Variant("attention: scores of heads of 384", "attention_scores", _HEADS),
    Variant("attention: values, rotate 32", "attention_values", {"codes": True, "block": 32, **_HEADS}),
)
"""Kernels that take in what stands before or after a product."""
VARIANTS: Sequence[Variant] = (
    Variant("rotate 32, rows, fp16 to int8", "hadamard_quantize", {}),
    Variant("rotate 32, NCHW, fp16 to int8", "hadamard_quantize", _NCHW),
    Variant("rotate 128, rows, fp32 to int4", "hadamard_quantize", _WIDE, "fp32"),
    Variant("rotate 64 regular, rows, fp16 to int8", "hadamard_quantize", _REGULAR),
    Variant("GEMM, int8 weight", "int_gemm", {}),
    Variant("GEMM, two digits", "int_gemm", {"two_digits": True, "tile_outputs": 64}),
    Variant("GEMM, int4 weight, rotate 32", "int_gemm", _INT4),
    Variant("GEMM, int4 weight, rotate 128", "int_gemm", _DEEP),
    Variant("GEMM, int4 weight, rotate 256 regular", "int_gemm", _DEEPEST),
    Variant("conv 3×3, int8 weight, residual, SiLU", "int_conv2d", {"residual": True, "silu": True}),
    Variant("conv 3×3 stride 2, int4 weight, rotate 32", "int_conv2d", {"stride": (2, 2), **_INT4}),
    Variant("conv 3×3, int8 weight, 4 channels", "int_conv2d", _FEW),
    Variant("conv 3×3, int8 weight, a part of 8", "int_conv2d", {"splits": 8, "bias": False, "tile_outputs": 64}),
    Variant("sum of 8 parts, SiLU", "sum_splits", {"splits": 8, "silu": True}),
    *FUSED,
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
    """Markdown: one line a variant, one column an architecture; a cell is instruction and registers, spills if any."""
    archs = list(dict.fromkeys(str(line["arch"]) for line in found))
    cells = {(str(line["variant"]), str(line["arch"])): line for line in found}
    names = list(dict.fromkeys(variant for variant, _ in cells))
    lines = [" | ".join(("variant", *archs, "shared, KiB")), " | ".join("---" for _ in range(len(archs) + 2))]
    for name in names:
        across = [cells[name, arch] for arch in archs]
        sizes = sorted(int(line["shared"]) for line in across)
        shared = " – ".join(f"{round(n / 1024, 1):g}" for n in dict.fromkeys((sizes[0], sizes[-1])))
        lines.append(" | ".join((name, *map(_cell, across), shared)))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(line: Mapping[str, str | int]) -> str:
    spills = f", {line['spills']} B spilled" if line["spills"] else ""
    return f"{line['instruction']} {line['registers']}{spills}".strip()
