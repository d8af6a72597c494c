"""What a kernel is compiled for: frozen options, their compile-time constants, and the parameters of the entry point.

The launchers and the ahead-of-time compiler read the same options, so both run the same code.
"""

from collections.abc import Mapping
from typing import TypeAlias

from hqc.kernels.attention_options import ScoresOptions, ValuesOptions
from hqc.kernels.parameters import BLOCKS, FLOATS, Parameter, Role
from hqc.kernels.product_options import ConvOptions, GemmOptions, SumOptions, WeightForm
from hqc.kernels.quantiser_options import (
    AffineOptions,
    GateOptions,
    GroupNormOptions,
    HadamardOptions,
    LayerNormOptions,
    StatisticsOptions,
)

__all__ = [
    "BLOCKS",
    "FLOATS",
    "KERNELS",
    "MODULES",
    "AffineOptions",
    "ConvOptions",
    "GateOptions",
    "GemmOptions",
    "GroupNormOptions",
    "HadamardOptions",
    "KernelOptions",
    "LayerNormOptions",
    "Parameter",
    "Role",
    "ScoresOptions",
    "StatisticsOptions",
    "SumOptions",
    "ValuesOptions",
    "WeightForm",
]

KernelOptions: TypeAlias = (
    HadamardOptions
    | StatisticsOptions
    | AffineOptions
    | GroupNormOptions
    | LayerNormOptions
    | GateOptions
    | ScoresOptions
    | ValuesOptions
    | GemmOptions
    | ConvOptions
    | SumOptions
)
MODULES: Mapping[str, str] = {
    "hadamard_quantize_rows": "hadamard_quantize",
    "hadamard_quantize_nchw": "hadamard_quantize",
    "column_statistics": "statistics",
    "group_norm_affine": "group_norm",
    "group_norm_quantize": "group_norm",
    "layer_norm_quantize": "layer_norm",
    "gate_quantize": "gate",
    "attention_scores": "attention",
    "attention_values": "attention",
    "int_gemm": "int_gemm",
    "int_conv2d": "int_conv2d",
    "sum_splits": "epilogue",
}
"""Where in `hqc.kernels.jit` each function stands."""
KERNELS: Mapping[str, type[KernelOptions]] = {
    "hadamard_quantize": HadamardOptions,
    "column_statistics": StatisticsOptions,
    "group_norm_affine": AffineOptions,
    "group_norm_quantize": GroupNormOptions,
    "layer_norm_quantize": LayerNormOptions,
    "gate_quantize": GateOptions,
    "attention_scores": ScoresOptions,
    "attention_values": ValuesOptions,
    "int_gemm": GemmOptions,
    "int_conv2d": ConvOptions,
    "sum_splits": SumOptions,
}
"""Kernels by name, with the options that each takes."""
