"""ONNX translations that targets share: the timestep's row, packed weights, per-sample scales, rotations."""

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import fx

from hqc.export.builder import typed
from hqc.export.lowering import Lowering
from hqc.ops import hadamard_matrix
from hqc.rotations import Rotation
from hqc.sites import rotation_of

__all__ = ["int4_weight", "looked_up", "matrix_name", "nearest_timestep", "per_sample", "signed_sums", "signs"]

FLOAT = ir.DataType.FLOAT


def nearest_timestep(lo: Lowering, node: fx.Node) -> ir.Value:
    """argmin_i |timestep[n] - grid[i]|; the first of equals wins, as in torch."""
    b = lo.builder
    timestep, grid = lo.values_of(node.args[:2])
    distance = b.op("Abs", b.op("Sub", b.op("Unsqueeze", timestep, b.ints(1)), b.op("Unsqueeze", grid, b.ints(0))))
    return typed(b.op("ArgMin", distance, axis=1, keepdims=0, name="timestep_row"), ir.DataType.INT64)


def int4_weight(lo: Lowering, node: fx.Node) -> ir.Value:
    """An INT4 initialiser over the very bytes that the program packed: the first code in the low nibble, as in ONNX."""
    source, shape = node.args[:2]
    name = str(source.target)  # type: ignore[union-attr]
    packed = lo.program.state[name].cpu().numpy()
    dims = [int(d) for d in shape]  # type: ignore[union-attr, arg-type]
    assert packed.size == math.ceil(math.prod(dims) / 2)
    return lo.builder.initializer(name, ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape(dims), name=name))


def looked_up(lo: Lowering, node: fx.Node) -> ir.Value:
    """table [O, E] by codes c [O, …]: Cast → Add(E/2) → GatherElements. Runtimes fold it when they load a model."""
    b = lo.builder
    table, shape = lo.value(node.args[1]), [int(d) for d in lo.shape(node)]
    entries = int(lo.shape(node.args[1])[1])
    # By INT8: onnxruntime has neither a Reshape of INT4 nor its cast to INT64.
    flat = typed(b.reshape(b.cast(lo.value(node.args[0]), ir.DataType.INT8), [shape[0], -1]), ir.DataType.INT8)
    places = typed(b.op("Add", b.cast(flat, ir.DataType.INT64), b.ints(entries // 2)), ir.DataType.INT64)
    values = typed(b.op("GatherElements", table, places, axis=1), FLOAT)
    return typed(b.reshape(values, shape, name=node.name), FLOAT)


def per_sample(lo: Lowering, scale: ir.Value, rank: int) -> ir.Value:
    """scale [N] -> [N, 1, …] of the given rank."""
    return lo.builder.reshape(scale, [-1] + [1] * (rank - 1))


def signs(rotation: Rotation) -> NDArray[np.float32]:
    """H of some order and kind: ±1, exact in every float type."""
    return hadamard_matrix(rotation).numpy().astype(np.float32)


def matrix_name(rotation: Rotation, prefix: str = "hadamard") -> str:
    """What a constant with the matrix is called: hadamard_32, hadamard_regular_64."""
    return f"{prefix}_{'regular_' if rotation.regular else ''}{rotation.block}"


def signed_sums(lo: Lowering, rotation: fx.Node, name: str) -> ir.Value:
    """±H·x along the rotated axis, without the factor 1/√b, in torch's layout.

    Any axis before the last:  [N, C, …] -> [N, C/b, b, …] -> H @ it -> [N, C, …]
    The last one:              [N, …, C] -> [N, …, C/b, b] -> it @ H -> [N, …, C]

    Reshape is of x itself: the builder's would start at what x was reshaped from, and leave nothing to listen to.
    """
    b = lo.builder
    turn, shape = rotation_of(rotation), lo.static_shape(rotation)
    axis = int(rotation.args[2]) % len(shape)  # type: ignore[arg-type]
    matrix, split = b.constant(signs(turn), matrix_name(turn)), [shape[axis] // turn.block, turn.block]
    last = axis == len(shape) - 1
    inner = [] if last else [math.prod(shape[axis + 1 :])]
    groups = typed(b.op("Reshape", lo.value(rotation.args[0]), b.ints(*shape[:axis], *split, *inner)), FLOAT)
    operands = (groups, matrix) if last else (matrix, groups)
    sums = typed(b.op("MatMul", *operands, name=f"{name}.rotated"), FLOAT)
    return typed(b.op("Reshape", sums, b.ints(*shape)), FLOAT)
