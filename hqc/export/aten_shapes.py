"""ONNX translations of ATen operators that move data: views, permutations, slices, concatenation."""

import operator
from typing import Any

import onnx_ir as ir
from torch import fx

from hqc.errors import ExportError
from hqc.export.aten_images import IMAGES
from hqc.export.lowering import Lowering, Translations, batch_dims, onnx_dtype
from hqc.program import aten

__all__ = ["SHAPES"]

_LAST = 2**63 - 1


def _same(lo: Lowering, node: fx.Node) -> ir.Value:
    return lo.value(node.args[0])


def _cast(lo: Lowering, node: fx.Node) -> ir.Value:
    """Casts only where the type changes; the program notes both types."""
    source = node.args[0]
    x = lo.value(source)
    wanted = node.meta.get("dtype")
    if wanted is None or source.meta.get("dtype", wanted) == wanted:  # type: ignore[union-attr]
        return x
    return lo.builder.cast(x, onnx_dtype(wanted))


def _reshape(lo: Lowering, node: fx.Node) -> ir.Value:
    """Every view is a Reshape to the noted shape, with -1 for the batch."""
    source = node.args[0]
    if lo.shape(source) == lo.shape(node):
        return lo.value(source)
    return lo.builder.reshape(lo.value(source), lo.static_shape(node), node.name)


def _expand(lo: Lowering, node: fx.Node) -> ir.Value:
    have, want = lo.shape(node.args[0]), lo.shape(node)
    if have == want:
        return lo.value(node.args[0])
    aligned = (1,) * (len(want) - len(have)) + have
    # An axis that keeps its size is asked for as 1: Expand broadcasts both ways.
    target = [1 if a == b else b for a, b in zip(aligned, want, strict=True)]
    return lo.builder.op("Expand", lo.value(node.args[0]), batch_dims(lo, target), name=node.name)


def _permute(lo: Lowering, node: fx.Node) -> ir.Value:
    rank = len(lo.shape(node.args[0]))
    return lo.builder.transpose(lo.value(node.args[0]), [int(d) % rank for d in node.args[1]], node.name)  # type: ignore[union-attr, arg-type]


def _transpose(lo: Lowering, node: fx.Node) -> ir.Value:
    rank = len(lo.shape(node.args[0]))
    perm = list(range(rank))
    a, b = (int(d) % rank for d in node.args[1:3]) if len(node.args) > 2 else (rank - 2, rank - 1)  # type: ignore[arg-type]
    perm[a], perm[b] = perm[b], perm[a]
    return lo.builder.transpose(lo.value(node.args[0]), perm, node.name)


def _cat(lo: Lowering, node: fx.Node) -> ir.Value:
    return lo.builder.op("Concat", *lo.values_of(node.args[0]), axis=_axis(node), name=node.name)  # type: ignore[arg-type]


def _axis(node: fx.Node, default: int = 0) -> int:
    return int(node.args[1]) if len(node.args) > 1 else default  # type: ignore[arg-type]


def _stack(lo: Lowering, node: fx.Node) -> ir.Value:
    axis = _axis(node)
    parts = [lo.builder.op("Unsqueeze", v, lo.builder.ints(axis)) for v in lo.values_of(node.args[0])]  # type: ignore[arg-type]
    return lo.builder.op("Concat", *parts, axis=axis, name=node.name)


def _split(lo: Lowering, node: fx.Node, sizes: list[int], axis: int) -> tuple[ir.Value, ...]:
    return lo.builder.ops(
        "Split", lo.value(node.args[0]), lo.builder.ints(*sizes), count=len(sizes), axis=axis, name=node.name
    )


def _extent(lo: Lowering, node: fx.Node, axis: int) -> int:
    size = lo.shape(node.args[0])[axis]
    if not isinstance(size, int):
        raise ExportError(f"node {node.name}", "splits the batch axis", "Rewrite the model without that.")
    return size


def _chunk(lo: Lowering, node: fx.Node) -> tuple[ir.Value, ...]:
    count, axis = int(node.args[1]), int(node.args[2]) if len(node.args) > 2 else 0  # type: ignore[arg-type]
    size = _extent(lo, node, axis)
    step = -(-size // count)
    return _split(lo, node, [min(step, size - i) for i in range(0, size, step)], axis)


def _split_tensor(lo: Lowering, node: fx.Node) -> tuple[ir.Value, ...]:
    step, axis = int(node.args[1]), int(node.args[2]) if len(node.args) > 2 else 0  # type: ignore[arg-type]
    size = _extent(lo, node, axis)
    return _split(lo, node, [min(step, size - i) for i in range(0, size, step)], axis)


def _split_sizes(lo: Lowering, node: fx.Node) -> tuple[ir.Value, ...]:
    axis = int(node.args[2]) if len(node.args) > 2 else 0  # type: ignore[arg-type]
    return _split(lo, node, [int(s) for s in node.args[1]], axis)  # type: ignore[union-attr, arg-type]


def _unbind(lo: Lowering, node: fx.Node) -> tuple[ir.Value, ...]:
    """The slices along an axis, without it."""
    axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    parts = range(_extent(lo, node, axis))
    x, b = lo.value(node.args[0]), lo.builder
    return tuple(b.op("Gather", x, b.scalar(i, "int64"), axis=axis, name=node.name) for i in parts)


def _repeat_interleave(lo: Lowering, node: fx.Node) -> ir.Value:
    """Every element along an axis `repeats` times in a row: [.., A, ..] -> [.., A, r, ..] -> [.., A·r, ..]."""
    repeats, axis = int(node.args[1]), node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")  # type: ignore[arg-type]
    if axis is None:
        raise ExportError(f"node {node.name}", "repeats a flattened tensor", "Name the axis.")
    b, rank = lo.builder, len(lo.shape(node))
    place = int(axis) % rank + 1  # type: ignore[arg-type]
    copies = b.ints(*(repeats if i == place else 1 for i in range(rank + 1)))
    spread = b.op("Expand", b.op("Unsqueeze", lo.value(node.args[0]), b.ints(place)), copies)
    return b.reshape(spread, lo.static_shape(node), node.name)


def _getitem(lo: Lowering, node: fx.Node) -> ir.Value:
    parts = lo.values[node.args[0]]  # type: ignore[index]
    return parts[node.args[1]]  # type: ignore[no-any-return]


def _slice(lo: Lowering, node: fx.Node) -> ir.Value:
    args: list[Any] = [*node.args[1:], *[None] * 4][:4]
    axis, start, end, step = args[0] or 0, args[1] or 0, args[2], args[3] or 1
    if not all(isinstance(v, int) for v in (axis, start, step)):
        raise ExportError(f"node {node.name}", "slices by a size that depends on the batch", "Rewrite the model.")
    if lo.shape(node.args[0]) == lo.shape(node):
        return lo.value(node.args[0])
    b = lo.builder
    # An end that depends on the batch is the size that the program notes for the result.
    ends = batch_dims(lo, [lo.shape(node)[axis]]) if isinstance(end, fx.Node) else b.ints(_LAST if end is None else end)
    if isinstance(end, fx.Node) and (start != 0 or step != 1):
        raise ExportError(f"node {node.name}", "slices by a size that depends on the batch", "Rewrite the model.")
    return b.op("Slice", lo.value(node.args[0]), b.ints(start), ends, b.ints(axis), b.ints(step), name=node.name)


def _select(lo: Lowering, node: fx.Node) -> ir.Value:
    index = lo.builder.scalar(int(node.args[2]), "int64")  # type: ignore[arg-type]
    return lo.builder.op("Gather", lo.value(node.args[0]), index, axis=int(node.args[1]), name=node.name)  # type: ignore[arg-type]


def _index_select(lo: Lowering, node: fx.Node) -> ir.Value:
    table, axis, index = node.args[:3]
    return lo.builder.op("Gather", lo.value(table), lo.value(index), axis=int(axis), name=node.name)  # type: ignore[arg-type]


def _embedding(lo: Lowering, node: fx.Node) -> ir.Value:
    return lo.builder.op("Gather", lo.value(node.args[0]), lo.value(node.args[1]), axis=0, name=node.name)


def _unread(lo: Lowering, node: fx.Node) -> None:
    """Memory that nobody has written stands where a product's factor of 0 leaves it out, as plain attention does."""


def _full(value: float | None) -> Any:
    def translate(lo: Lowering, node: fx.Node) -> ir.Value:
        number = float(node.args[1]) if value is None else value  # type: ignore[arg-type]
        scalar = lo.builder.scalar(number, lo.scalar_like(node))
        return lo.builder.op("Expand", scalar, batch_dims(lo, lo.shape(node)), name=node.name)

    return translate


SHAPES: Translations = {
    **dict.fromkeys(
        (
            aten.contiguous.default,
            aten.clone.default,
            aten.alias.default,
            aten.detach.default,
            aten.dropout.default,
            aten.feature_dropout.default,
            aten.lift_fresh_copy.default,
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.to.other,
            aten._to_copy.default,
            aten.type_as.default,
        ),
        _cast,
    ),
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.unsqueeze.default,
            aten.squeeze.dim,
            aten.squeeze.default,
            aten.squeeze.dims,
        ),
        _reshape,
    ),
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.broadcast_to.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    **dict.fromkeys((aten.cat.default, aten.concat.default), _cat),
    aten.stack.default: _stack,
    aten.chunk.default: _chunk,
    aten.split.Tensor: _split_tensor,
    aten.split_with_sizes.default: _split_sizes,
    aten.unbind.int: _unbind,
    aten.repeat_interleave.self_int: _repeat_interleave,
    operator.getitem: _getitem,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.embedding.default: _embedding,
    aten.empty.memory_format: _unread,
    aten.ones.default: _full(1.0),
    aten.zeros.default: _full(0.0),
    aten.ones_like.default: _full(1.0),
    aten.zeros_like.default: _full(0.0),
    aten.full.default: _full(None),
    **IMAGES,
}
