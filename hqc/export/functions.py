"""`hqc::Hadamard` in ONNX: its schema, and model-local function bodies of standard operators.

    Hadamard(x; block, axis, regular) = x rotated along `axis` by H/√block, H ±1
        regular 0    H[i, j] = (-1)^popcount(i & j), Sylvester's
        regular 1    H[i, j] = (-1)^popcount(e & (e >> 1) & 0x55), e = i xor j, for an order 4^k;
                     (-1)^popcount((e & (e >> 1) & 0xAA) xor (i & j & 1)) for an order 2·4^k

A runtime without a kernel for the operator inlines the body; one with a kernel (a TensorRT plugin) maps the node.
The sum over ±x comes first and the factor 1/√block last, in the order of the torch reference `hqc::hadamard`.
"""

from functools import lru_cache

import onnx
import onnx_ir as ir

from hqc.export.builder import HQC_DOMAIN

__all__ = ["MATRIX_BODY", "hadamard_function", "register_schemas"]

# The parity of some bits, folded with xor; block ≤ 256, so that an index fits 8 bits. `lower_bits` are those of
# each pair that a regular matrix takes together, none for Sylvester's; the other bits are those of i & j.
MATRIX_BODY = """
    order = Constant <value_int: int = @block> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    indices = Range (zero, order, one)
    index = Cast <to = 2> (indices)
    last_axis = Constant <value_ints = [1]> ()
    column = Unsqueeze (index, last_axis)
    four = Constant <value = uint8 {4}> ()
    two = Constant <value = uint8 {2}> ()
    unit = Constant <value = uint8 {1}> ()
    regular = Constant <value_int: int = @regular> ()
    regular_byte = Cast <to = 2> (regular)
    odd_powers = Constant <value_int = 170> ()
    odd_power = BitwiseAnd (order, odd_powers)
    is_odd_power = Cast <to = 9> (odd_power)
    first_pair = Cast <to = 2> (is_odd_power)
    every_other = Constant <value = uint8 {85}> ()
    all_pairs = BitShift <direction = "LEFT"> (every_other, first_pair)
    lower_bits = Mul (all_pairs, regular_byte)
    upper_bits = BitShift <direction = "LEFT"> (lower_bits, unit)
    paired_bits = BitwiseOr (lower_bits, upper_bits)
    single_bits = BitwiseNot (paired_bits)
    both = BitwiseAnd (column, index)
    both_single = BitwiseAnd (both, single_bits)
    either = BitwiseXor (column, index)
    either_upper = BitShift <direction = "RIGHT"> (either, unit)
    either_both = BitwiseAnd (either, either_upper)
    either_paired = BitwiseAnd (either_both, lower_bits)
    bits = BitwiseXor (both_single, either_paired)
    bits_4 = BitShift <direction = "RIGHT"> (bits, four)
    fold_4 = BitwiseXor (bits, bits_4)
    bits_2 = BitShift <direction = "RIGHT"> (fold_4, two)
    fold_2 = BitwiseXor (fold_4, bits_2)
    bits_1 = BitShift <direction = "RIGHT"> (fold_2, unit)
    fold_1 = BitwiseXor (fold_2, bits_1)
    odd = BitwiseAnd (fold_1, unit)
    odd_real = Cast <to = 1> (odd)
    plus = Constant <value_float = 1.0> ()
    double = Add (odd_real, odd_real)
    matrix = Sub (plus, double)
    order_real = Cast <to = 11> (order)
    root = Sqrt (order_real)
    inverse_root = Reciprocal (root)
    factor = Cast <to = 1> (inverse_root)
    order_vector = Unsqueeze (order, axis_0)
"""

# Any axis: [outer, block, inner] -> [outer, inner, block], product, and back.
_ANY_AXIS = """
    axis_0 = Constant <value_ints = [0]> ()
    {matrix}
    shape = Shape (x)
    rank_vector = Shape (shape)
    axis = Constant <value_ints_axis> ()
    wrapped = Mod (axis_plus_rank, rank_vector)
    next = Add (wrapped, last_axis)
    tail = Slice (shape, next, rank_vector)
    inner = ReduceProd <keepdims = 1> (tail)
    any = Constant <value_ints = [-1]> ()
    split = Concat <axis = 0> (any, order_vector, inner)
    groups = Reshape (x, split)
    turned = Transpose <perm = [0, 2, 1]> (groups)
    sums = MatMul (turned, matrix)
    scaled = Mul (sums, factor)
    back = Transpose <perm = [0, 2, 1]> (scaled)
    y = Reshape (back, shape)
""".replace(
    "axis = Constant <value_ints_axis> ()",
    "axis = Constant <value_int: int = @axis> ()\n    axis_plus_rank = Add (axis, rank_vector)",
)


def hadamard_function(opset: int) -> ir.Function:
    """The body of `hqc::Hadamard` for an opset."""
    body = _ANY_AXIS.format(matrix=MATRIX_BODY.strip())
    header = f'<domain: "{HQC_DOMAIN}", opset_import: ["" : {opset}]>\nHadamard <block, axis, regular> (x) => (y)'
    return ir.serde.deserialize_function(onnx.parser.parse_function(f"{header} {{{body}}}"))


@lru_cache(maxsize=1)
def register_schemas() -> None:
    """Registers `hqc::Hadamard` with onnx, so that the full checker infers its type and shape."""
    kind = onnx.defs.OpSchema
    schema = kind(
        "Hadamard",
        HQC_DOMAIN,
        1,
        doc="Rotates one axis by a block-diagonal normalised Hadamard matrix.",
        inputs=[kind.FormalParameter("x", "T")],
        outputs=[kind.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "real values")],
        attributes=[
            kind.Attribute("block", kind.AttrType.INT, "order of the matrix, a power of two up to 256", required=True),
            kind.Attribute("axis", kind.AttrType.INT, "the rotated axis", required=True),
            kind.Attribute("regular", kind.AttrType.INT, "1: the regular matrix, 0: Sylvester's", required=True),
        ],
    )
    if hasattr(schema, "set_type_and_shape_inference_function"):
        schema.set_type_and_shape_inference_function(_same_shape)
    onnx.defs.register_schema(schema)


def _same_shape(context: onnx.shape_inference.InferenceContext) -> None:
    context.set_output_type(0, context.get_input_type(0))
