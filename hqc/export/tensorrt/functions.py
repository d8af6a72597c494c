"""The plugin nodes of `plugins = qdp` and their bodies in standard operators, which every other runtime inlines.

    HadamardQuantize(x, inv_scale [N]; block, low, high, channel_axis, regular) -> q int8, the shape of x
        q = clip(round(Ĥ·x · inv_scale[n]), low, high),  Ĥ = H_block/√block along channel_axis (1 or −1)
    HadamardQuantizeBounded(x, step [N, 3]; block, channel_axis, regular) -> q int8
        the same with step[n] = 1/s, least and largest code of the sample
    Int4Linear(q […, K], weight int8 [O, K/2], scale_w [O], scale_a [N], bias [O]; block, out_type, regular) -> […, O]
        y = (q @ (W·H_block)ᵀ)·scale_w[o]·scale_a[n] + bias[o],  H_block ±1; 1/√block is part of scale_w
    Int4Conv(q [N, C, H, W], weight int8 [O, kh·kw·C/2], …; + kernel, stride, padding) -> [N, O, H', W']
        the same with a square kernel; weights in the order kh, kw, C, the order of an NHWC kernel

regular is 1 for the regular H and 0 for Sylvester's (`hqc.export.functions`); block 1 does not rotate. Weights are the
stored codes −8…7, two a byte, the first in the low nibble; the bytes are int8 because TensorRT's parser
widens uint8. Images are NCHW here, as everywhere in ONNX;
a plugin may ask for the same tensors in a channels-last format. out_type is ONNX's number of a type (1 float32,
10 float16, 16 bfloat16). There is no QuantizeLinear in a body: TensorRT's parser takes a function that has one only
once. Attributes are whole numbers, apart from the two that name the plugin, because others arrive damaged.
"""

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from hqc.export.builder import HQC_DOMAIN
from hqc.export.functions import MATRIX_BODY

__all__ = ["PLUGIN_ATTRIBUTES", "PLUGIN_NODES", "ROTATING_NODES", "plugin_functions"]

PLUGIN_ATTRIBUTES = {"plugin_namespace": HQC_DOMAIN, "plugin_version": "1", "aot": 1}
"""What makes TensorRT prefer a registered plugin to the function body, and its kernel inside the engine to Python."""

_HADAMARD_QUANTIZE = """
    axis_0 = Constant <value_ints = [0]> ()
    {matrix}
    shape = Shape (x)
    rank = Shape (shape)
    axis = Constant <value_int: int = @channel_axis> ()
    axis_plus_rank = Add (axis, rank)
    wrapped = Mod (axis_plus_rank, rank)
    next = Add (wrapped, last_axis)
    tail = Slice (shape, next, rank)
    inner = ReduceProd <keepdims = 1> (tail)
    any = Constant <value_ints = [-1]> ()
    split = Concat <axis = 0> (axis_0, any, order_vector, inner)
    real = Cast <to = 1> (x)
    groups = Reshape (real, split)
    turned = Transpose <perm = [0, 1, 3, 2]> (groups)
    sums = MatMul (turned, matrix)
    scaled = Mul (sums, factor)
    per_sample = Constant <value_ints = [-1, 1, 1, 1]> ()
    {bounds}
    steps = Reshape (inv_scale, per_sample)
    level = Mul (scaled, steps)
    rounded = Round (level)
    at_least = Max (rounded, least)
    clipped = Min (at_least, largest)
    back = Transpose <perm = [0, 1, 3, 2]> (clipped)
    whole = Reshape (back, shape)
    q = Cast <to = 3> (whole)
"""

_OF_THE_NODE = """
    low = Constant <value_int: int = @low> ()
    high = Constant <value_int: int = @high> ()
    least = Cast <to = 1> (low)
    largest = Cast <to = 1> (high)
"""

_OF_THE_SAMPLE = """
    inv_scale, low, high = Split <axis = 1, num_outputs = 3> (step)
    least = Reshape (low, per_sample)
    largest = Reshape (high, per_sample)
"""

# int8 [O, K/2] -> float32 [O, K]: n xor 8 − 8 is the signed value of a nibble.
_ROTATED_WEIGHT = """
    axis_0 = Constant <value_ints = [0]> ()
    {matrix}
    nibble = Constant <value = uint8 {{15}}> ()
    sign = Constant <value = uint8 {{8}}> ()
    bytes = Cast <to = 2> (weight)
    first_bits = BitwiseAnd (bytes, nibble)
    second_bits = BitShift <direction = "RIGHT"> (bytes, four)
    first_shifted = BitwiseXor (first_bits, sign)
    second_shifted = BitwiseXor (second_bits, sign)
    axis_2 = Constant <value_ints = [2]> ()
    first_column = Unsqueeze (first_shifted, axis_2)
    second_column = Unsqueeze (second_shifted, axis_2)
    pairs = Concat <axis = 2> (first_column, second_column)
    pairs_real = Cast <to = 1> (pairs)
    eight = Constant <value_float = 8.0> ()
    codes = Sub (pairs_real, eight)
    any = Constant <value_ints = [-1]> ()
    by_block = Concat <axis = 0> (any, order_vector)
    groups = Reshape (codes, by_block)
    rotated = MatMul (groups, matrix)
    weight_shape = Shape (weight)
    first_dim = Constant <value_ints = [1]> ()
    outputs = Slice (weight_shape, axis_0, first_dim)
"""

_LINEAR = """
    {weight}
    rows_shape = Concat <axis = 0> (outputs, any)
    rows = Reshape (rotated, rows_shape)
    columns = Transpose <perm = [1, 0]> (rows)
    real = Cast <to = 1> (q)
    acc = MatMul (real, columns)
    acc_shape = Shape (acc)
    rank = Shape (acc_shape)
    ones_count = Sub (rank, first_dim)
    ones = ConstantOfShape <value = int64[1] {{1}}> (ones_count)
    per_sample = Concat <axis = 0> (any, ones)
    by_channel = Mul (acc, scale_w)
    steps = Reshape (scale_a, per_sample)
    scaled = Mul (by_channel, steps)
    sum = Add (scaled, bias)
    y = Cast <to: int = @out_type> (sum)
"""

# Padding and stride are whole numbers, which no Conv attribute can refer to: padded before, every s-th pixel after.
_CONV = """
    {weight}
    kernel_size = Constant <value_int: int = @kernel> ()
    kernel_vector = Unsqueeze (kernel_size, axis_0)
    taps_shape = Concat <axis = 0> (outputs, kernel_vector, kernel_vector, any)
    taps = Reshape (rotated, taps_shape)
    filters = Transpose <perm = [0, 3, 1, 2]> (taps)
    real = Cast <to = 1> (q)
    border = Constant <value_int: int = @padding> ()
    border_vector = Unsqueeze (border, axis_0)
    no_border = Constant <value_ints = [0, 0]> ()
    pads = Concat <axis = 0> (no_border, border_vector, border_vector, no_border, border_vector, border_vector)
    padded = Pad (real, pads)
    every = Conv (padded, filters)
    step = Constant <value_int: int = @stride> ()
    step_vector = Unsqueeze (step, axis_0)
    steps_2d = Concat <axis = 0> (step_vector, step_vector)
    starts = Constant <value_ints = [0, 0]> ()
    ends = Constant <value_ints = [9223372036854775807, 9223372036854775807]> ()
    pixel_axes = Constant <value_ints = [2, 3]> ()
    acc = Slice (every, starts, ends, pixel_axes, steps_2d)
    channels = Constant <value_ints = [-1, 1, 1]> ()
    per_sample = Constant <value_ints = [-1, 1, 1, 1]> ()
    channel_scale = Reshape (scale_w, channels)
    by_channel = Mul (acc, channel_scale)
    sample_scale = Reshape (scale_a, per_sample)
    scaled = Mul (by_channel, sample_scale)
    offset = Reshape (bias, channels)
    sum = Add (scaled, offset)
    y = Cast <to: int = @out_type> (sum)
"""

_NAMES = ("plugin_namespace", "plugin_version", "aot")
_OPERANDS = "(q, weight, scale_w, scale_a, bias) => (y)"

PLUGIN_NODES = {
    "HadamardQuantize": (
        ("block", "low", "high", "channel_axis", "regular"),
        "(x, inv_scale) => (q)",
        _HADAMARD_QUANTIZE.replace("{bounds}", _OF_THE_NODE.strip()),
    ),
    "HadamardQuantizeBounded": (
        ("block", "channel_axis", "regular"),
        "(x, step) => (q)",
        _HADAMARD_QUANTIZE.replace("{bounds}", _OF_THE_SAMPLE.strip()),
    ),
    "Int4Linear": (("block", "out_type", "regular"), _OPERANDS, _LINEAR),
    "Int4Conv": (("block", "kernel", "stride", "padding", "out_type", "regular"), _OPERANDS, _CONV),
}
"""Attributes, operands and body by name."""
ROTATING_NODES = ("HadamardQuantize", "HadamardQuantizeBounded")
"""Those that read real values and write codes."""


def plugin_functions(names: set[str], opset: int) -> Iterator[ir.Function]:
    """The bodies of the plugin nodes that a graph has, for an opset."""
    matrix = MATRIX_BODY.strip()
    weight = _ROTATED_WEIGHT.format(matrix=matrix).strip()
    for name in sorted(names & PLUGIN_NODES.keys()):
        attributes, operands, body = PLUGIN_NODES[name]
        head = f'<domain: "{HQC_DOMAIN}", opset_import: ["" : {opset}]>\n'
        head += f"{name} <{', '.join((*attributes, *_NAMES))}> {operands}"
        text = f"{head} {{{body.format(matrix=matrix, weight=weight)}}}"
        yield ir.serde.deserialize_function(onnx.parser.parse_function(text))
