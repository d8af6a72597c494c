"""ONNX translations that both targets share: the timestep's row, packed weights, per-sample scales."""

import math

import onnx_ir as ir
from torch import fx

from hqc.export.builder import typed
from hqc.export.lowering import Lowering

__all__ = ["int4_weight", "nearest_timestep", "per_sample"]


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


def per_sample(lo: Lowering, scale: ir.Value, rank: int) -> ir.Value:
    """scale [N] -> [N, 1, …] of the given rank."""
    return lo.builder.reshape(scale, [-1] + [1] * (rank - 1))
