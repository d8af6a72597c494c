"""The `hqc::` operators, one a file: torch reference, shape rule, gradient; importing registers them all.

In the order in which data meets them: the timestep picks a scale (`nearest_timestep`), activations are rotated
(`hadamard`) and quantised (`fake_quantize` while training; `quantize`, `dequantize` after; `fake_quantize_bounded` and
`quantize_bounded` where the range of codes is a tensor, made whole by `round_ste`; `fake_quantize_residual` adds a
binary code for what they leave of a weight; `softmax_quantize` for attention's probabilities; `dynamic_scale` and the
`…_grouped` forms of the first three where every group of channels has a scale), weights come from codes
(`unpack_int4`, `lookup`, `rotate_codes`, `digit`, `half`), meet in an integer product (`int_linear`, `int_conv2d`) and
go back to real units (`rescale`).
"""

from hqc.ops.bounded import fake_quantize_bounded, quantize_bounded
from hqc.ops.fake_quantize import fake_quantize
from hqc.ops.grouped import dequantize_grouped, dynamic_scale, fake_quantize_grouped, quantize_grouped
from hqc.ops.hadamard import hadamard, hadamard_matrix, regular, sylvester
from hqc.ops.integer_product import int_conv2d, int_linear
from hqc.ops.lookup import lookup, table_codes
from hqc.ops.nearest_timestep import nearest_timestep
from hqc.ops.quantize import dequantize, quantize
from hqc.ops.rescale import rescale
from hqc.ops.residual import fake_quantize_residual
from hqc.ops.softmax_quantize import softmax_quantize
from hqc.ops.straight_through import round_ste
from hqc.ops.weight_codes import digit, half, pack_int4, rotate_codes, unpack_int4
from hqc.rotations import block_size

__all__ = [
    "block_size",
    "dequantize",
    "dequantize_grouped",
    "digit",
    "dynamic_scale",
    "fake_quantize",
    "fake_quantize_bounded",
    "fake_quantize_grouped",
    "fake_quantize_residual",
    "hadamard",
    "hadamard_matrix",
    "half",
    "int_conv2d",
    "int_linear",
    "lookup",
    "nearest_timestep",
    "pack_int4",
    "quantize",
    "quantize_bounded",
    "quantize_grouped",
    "regular",
    "rescale",
    "rotate_codes",
    "round_ste",
    "softmax_quantize",
    "sylvester",
    "table_codes",
    "unpack_int4",
]
