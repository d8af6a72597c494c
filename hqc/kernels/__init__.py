"""GPU kernels in triton: rotate and quantise, integer matrix products, integer convolutions.

`launch` runs them on torch tensors, `compile` makes PTX and cubins of them without a GPU. Importing this package does
not import triton: the kernels themselves, in `jit`, are imported on first use.
"""

from hqc.kernels.launch import hadamard_quantize, int_conv2d, int_gemm
from hqc.kernels.operands import Epilogue, Weight
from hqc.kernels.weights import channels_last, pack_weight, packed_weight_fits

__all__ = [
    "Epilogue",
    "Weight",
    "channels_last",
    "hadamard_quantize",
    "int_conv2d",
    "int_gemm",
    "pack_weight",
    "packed_weight_fits",
]
