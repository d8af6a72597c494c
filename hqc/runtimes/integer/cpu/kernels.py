"""The CPU's set of kernels: products by oneDNN, passes compiled for this machine or in plain torch."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hqc.kernels import Weight
from hqc.runtimes.integer import reference
from hqc.runtimes.integer.cpu import plain
from hqc.runtimes.integer.cpu.compiler import compiled_passes
from hqc.runtimes.integer.cpu.native import NativePasses
from hqc.runtimes.integer.cpu.operators import ZERO, adds_in_int16
from hqc.runtimes.integer.cpu.own import OwnProducts
from hqc.runtimes.integer.cpu.products import pack_product
from hqc.runtimes.integer.kernel_set import Kernels, functions_of

__all__ = ["CpuKernels", "cpu_kernels"]

_LEFT_OUT = frozenset(
    {
        "statistics_from_products",  # the products are oneDNN's: their epilogues take no statistics, gates or codes
        "gate_in_product",
        "codes_from_products",
        "take_wide_attention",  # torch's attention takes heads of any width on a CPU
    }
)


@dataclass(frozen=True)
class CpuKernels:
    """The kernels of this machine, how passes and products run in one line, and the library that both are of."""

    kernels: Kernels
    said: str
    functions: ctypes.CDLL | None


def cpu_kernels(cache: Path | None = None) -> CpuKernels:
    """Those of this machine, compiled where they are not kept in `cache`."""
    library = compiled_passes(cache)
    native = None if library.functions is None else NativePasses(library.functions)
    own = None if library.functions is None else OwnProducts(library.functions)
    names = ("hadamard_quantize", "group_norm_quantize", "layer_norm_quantize", "gate_quantize")
    passes = {name: getattr(plain if native is None else native, name) for name in names}
    kernels = Kernels(
        "cpu",
        **{**functions_of(reference), **passes, "int_gemm": _int_gemm, "int_conv2d": _int_conv2d},
        pack=partial(_pack, own),
        leaves_out=_LEFT_OUT,
    )
    how = library.said if native is not None else f"plain torch: {library.said}"
    return CpuKernels(kernels, f"products: {_products(own)}; passes: {how}", library.functions)


def _products(own: OwnProducts | None) -> str:
    if own is not None and own.there and own.in_int16 and adds_in_int16():
        return "hqc's own, added in int16 as far as that holds them"
    sums = "int16 pairs, so that weights are split where they could saturate" if adds_in_int16() else "int32"
    small = "" if own is None or not own.there else "; small ones hqc's own"
    return f"oneDNN, added in {sums}{small}"


def _pack(own: OwnProducts | None, weight: Weight, reach: int, window: Any, size: Sequence[int]) -> Any:
    places = None if window is None else (window["stride"], window["padding"], window["dilation"])
    return pack_product(weight, reach, places, size, own)


def _int_gemm(codes: Tensor, *operands: Any) -> Tensor:
    """Of a weight that is not packed yet, in plain torch."""
    return reference.int_gemm(_signed(codes), *operands)


def _int_conv2d(codes: Tensor, *operands: Any, **window: Any) -> Tensor:
    return reference.int_conv2d(_signed(codes), *operands, **window)


def _signed(codes: Tensor) -> Tensor:
    return codes.to(reference.EXACT) - ZERO
