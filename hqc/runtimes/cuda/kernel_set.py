"""The three kernels as one value, so that a graph can be built over triton's or over plain torch's."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Kernels", "reference_kernels", "triton_kernels"]


@dataclass(frozen=True)
class Kernels:
    """hadamard_quantize, int_gemm and int_conv2d with the signatures of `hqc.kernels`."""

    name: str
    hadamard_quantize: Callable[..., Tensor]
    int_gemm: Callable[..., Tensor]
    int_conv2d: Callable[..., Tensor]


def triton_kernels() -> Kernels:
    """Those of `hqc.kernels`: compiled on a CUDA device, interpreted on a CPU with TRITON_INTERPRET=1."""
    from hqc import kernels

    return Kernels("triton", kernels.hadamard_quantize, kernels.int_gemm, kernels.int_conv2d)


def reference_kernels() -> Kernels:
    """The same in plain torch, on any device."""
    from hqc.runtimes.cuda import reference

    return Kernels("torch", reference.hadamard_quantize, reference.int_gemm, reference.int_conv2d)
