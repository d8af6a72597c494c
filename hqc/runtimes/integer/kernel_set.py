"""The kernels as one value, so that a graph can be built over triton's or over plain torch's."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from torch import Tensor

__all__ = ["Kernels", "reference_kernels", "triton_kernels"]


@dataclass(frozen=True)
class Kernels:
    """The functions of `hqc.kernels` with their signatures."""

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


def triton_kernels() -> Kernels:
    """Those of `hqc.kernels`: compiled on a CUDA device, interpreted on a CPU with TRITON_INTERPRET=1."""
    from hqc import kernels

    return _of("triton", kernels)


def reference_kernels() -> Kernels:
    """The same in plain torch, on any device."""
    from hqc.runtimes.integer import reference

    return _of("torch", reference)


def _of(name: str, module: ModuleType) -> Kernels:
    return Kernels(name, **{field.name: getattr(module, field.name) for field in fields(Kernels)[1:]})
