"""The kernels as one value, so that a graph can be built over triton's, over a CPU's, or over plain torch's."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from types import ModuleType
from typing import Any

from torch import Tensor

__all__ = ["Kernels", "functions_of", "reference_kernels", "triton_kernels"]


@dataclass(frozen=True)
class Kernels:
    """The functions of `hqc.kernels` with their signatures.

    pack: (weight, largest code, window, size of the image) -> the product that a layer calls from then on, with its
    weight in the kernels' own form; None where the functions take weights as they are. leaves_out: names of fusions
    that only other kernels are the quicker for.
    """

    name: str
    hadamard_quantize: Callable[..., Tensor]
    column_statistics: Callable[..., Any]
    group_norm_quantize: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
    layer_norm_quantize: Callable[..., tuple[Tensor, Tensor | None]]
    gate_quantize: Callable[..., Tensor]
    wide_attention: Callable[..., Tensor]
    int_gemm: Callable[..., Tensor]
    int_gemm_statistics: Callable[..., tuple[Tensor, Any]]
    int_conv2d: Callable[..., Tensor]
    int_conv2d_statistics: Callable[..., tuple[Tensor, Any]]
    pack: Callable[..., Any] | None = None
    leaves_out: frozenset[str] = frozenset()


def triton_kernels() -> Kernels:
    """Those of `hqc.kernels`: compiled on a CUDA device, interpreted on a CPU with TRITON_INTERPRET=1."""
    from hqc import kernels

    return Kernels("triton", **functions_of(kernels))


def reference_kernels() -> Kernels:
    """The same in plain torch, on any device."""
    from hqc.runtimes.integer import reference

    return Kernels("torch", **functions_of(reference))


def functions_of(module: ModuleType) -> dict[str, Any]:
    """A module's functions by the names of the fields that they fill."""
    return {field.name: getattr(module, field.name) for field in fields(Kernels)[1:] if field.default is MISSING}
