"""GPU kernels in triton: rotate and quantise, alone or with a norm or gate, integer matrix products and convolutions.

`quantisers`, `attention` and `launch` run them on torch tensors, `compile` makes PTX and cubins of them without a GPU.
Importing this package does not import triton: the kernels themselves, in `jit`, are imported on first use.
"""

from hqc.kernels.attention import wide_attention
from hqc.kernels.launch import int_conv2d, int_conv2d_statistics, int_gemm, int_gemm_statistics
from hqc.kernels.operands import ColumnStatistics, Epilogue, Quantiser, Weight
from hqc.kernels.quantisers import (
    GroupNorm,
    LayerNorm,
    column_statistics,
    gate_quantize,
    group_norm_quantize,
    hadamard_quantize,
    layer_norm_quantize,
)
from hqc.kernels.weights import channels_last, pack_weight, packed_weight_fits

__all__ = [
    "ColumnStatistics",
    "Epilogue",
    "GroupNorm",
    "LayerNorm",
    "Quantiser",
    "Weight",
    "channels_last",
    "column_statistics",
    "gate_quantize",
    "group_norm_quantize",
    "hadamard_quantize",
    "int_conv2d",
    "int_conv2d_statistics",
    "int_gemm",
    "int_gemm_statistics",
    "layer_norm_quantize",
    "pack_weight",
    "packed_weight_fits",
    "wide_attention",
]
