"""ONNX translations of ATen operators that make an image larger: padding, nearest-neighbour upsampling."""

import math

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from hqc.errors import ExportError
from hqc.export.builder import GraphBuilder
from hqc.export.lowering import Lowering, Translations
from hqc.program import aten

__all__ = ["IMAGES"]

_LAST = 2**63 - 1


def _pad(lo: Lowering, node: fx.Node) -> ir.Value:
    """torch pads from the last axis backwards: (left, right, top, bottom, …)."""
    amounts = [int(a) for a in node.args[1]]  # type: ignore[union-attr, arg-type]
    mode = str(node.args[2]) if node.target is aten.pad.default and len(node.args) > 2 else "constant"
    if mode == "circular":
        return _wrapped(lo, node, amounts)
    if mode not in ("constant", "reflect", "replicate"):
        raise ExportError(f"node {node.name}", f"pads in mode {mode}", "Rewrite the model.")
    last = 3 if node.target is aten.pad.default else 2
    fill = float(node.args[last]) if len(node.args) > last and node.args[last] is not None else 0.0  # type: ignore[arg-type]
    axes = [-1 - i for i in range(len(amounts) // 2)]
    pads = lo.builder.ints(*amounts[0::2], *amounts[1::2])
    kind = {"replicate": "edge"}.get(mode, mode)
    return lo.builder.op(
        "Pad", lo.value(node.args[0]), pads, lo.builder.scalar(fill), lo.builder.ints(*axes), mode=kind, name=node.name
    )


def _wrapped(lo: Lowering, node: fx.Node, amounts: list[int]) -> ir.Value:
    """Each axis with its own end in front of it and its own beginning behind it.

    Slices and a Concat, not Pad in mode wrap (opset 19): every runtime has those, and they are copies as well.
    """
    if min(amounts) < 0:
        raise ExportError(f"node {node.name}", "pads circularly by a negative amount", "Crop by slicing instead.")
    b, x = lo.builder, lo.value(node.args[0])
    rank = len(lo.shape(node))
    for i, (before, after) in enumerate(zip(amounts[0::2], amounts[1::2], strict=True)):
        axis = rank - 1 - i
        front = [b.op("Slice", x, b.ints(-before), b.ints(_LAST), b.ints(axis))] if before else []
        back = [b.op("Slice", x, b.ints(0), b.ints(after), b.ints(axis))] if after else []
        if front or back:
            x = b.op("Concat", *front, x, *back, axis=axis, name=node.name)
    return x


def _upsample_nearest(lo: Lowering, node: fx.Node) -> ir.Value:
    """Resize where every runtime finds torch's pixels, else the pixels by number.

    Whole factors by scales, others by sizes: the scales of 5 → 9 are no float32 numbers. Where a source coordinate
    falls on a whole number, float noise would decide between two pixels, so those are not left to the runtime.
    """
    have, want = lo.static_shape(node.args[0])[2:], lo.static_shape(node)[2:]
    if -1 in (*have, *want) or len(node.all_input_nodes) > 1:
        raise ExportError(f"node {node.name}", "upsamples to a size that is not fixed", "Capture it with fixed sizes.")
    b, x = lo.builder, lo.value(node.args[0])
    chosen = _source_pixels(node, have)
    if not all(map(_is_plain, have, want, chosen)):
        for axis, pixels in enumerate(chosen, start=2):
            x = b.op("Gather", x, b.constant(np.asarray(pixels, np.int64), "pixels"), axis=axis, name=node.name)
        return x
    whole = all(n % m == 0 for m, n in zip(have, want, strict=True))
    factors = [1.0, 1.0, *(n / m for m, n in zip(have, want, strict=True))]
    scales = b.constant(np.asarray(factors, np.float32), "scales") if whole else None
    sizes = [] if whole else [_with_batch_of(b, x, lo.static_shape(node)[1:])]
    return b.op(
        "Resize",
        *(x, None, scales, *sizes),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
        name=node.name,
    )


def _with_batch_of(builder: GraphBuilder, x: ir.Value, rest: list[int]) -> ir.Value:
    """[x's first size, *rest] as an int64 vector: the first may be any function of the batch."""
    return builder.op("Concat", builder.op("Shape", x, start=0, end=1), builder.ints(*rest), axis=0)


def _source_pixels(node: fx.Node, have: list[int]) -> list[list[int]]:
    """For every row and every column of the result, the row or column of the input, as torch itself chooses."""
    chosen = []
    for axis, size in enumerate(have):
        shape = [1, 1, 1, 1]
        shape[2 + axis] = size
        numbers = torch.arange(size, dtype=torch.float32).view(shape).expand(1, 1, *have)
        result = node.target(numbers.contiguous(), *node.args[1:], **node.kwargs)  # type: ignore[operator]
        chosen.append([int(i) for i in result.select(3 - axis, 0).flatten().tolist()])
    return chosen


_LARGEST_GRID = 2**20
"""Above this many steps, old times new, float32 does not tell neighbouring source coordinates apart for certain."""


def _is_plain(have: int, want: int, pixels: list[int]) -> bool:
    """Whether the pixels are ⌊i·have/want⌋, and no rounding of that in float32 gives others."""
    certain = want % have == 0 or (math.gcd(have, want) == 1 and have * want < _LARGEST_GRID)
    return certain and pixels == [i * have // want for i in range(want)]


IMAGES: Translations = {
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    **dict.fromkeys(
        (
            aten.upsample_nearest2d.vec,
            aten.upsample_nearest2d.default,
            aten._upsample_nearest_exact2d.vec,
            aten._upsample_nearest_exact2d.default,
        ),
        _upsample_nearest,
    ),
}
