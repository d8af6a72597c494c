"""The least and the largest code of a quantiser: two numbers, or a row of two tables.

symmetric     -Q … Q             whole numbers in the call
asymmetric    -z … 2ⁿ-1-z        of a zero point z: activations look it up by the timestep, weights have one a channel
mixed         -z … t-z           with a top t for every output channel of a weight
softmax       0 … 2ⁿ-1           of probabilities
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hqc.errors import ExportError
from hqc.ops.fake_quantize import per_first_axis
from hqc.ops.grouped import spread
from hqc.program import Program, aten, is_op

__all__ = [
    "DEQUANTISERS",
    "FAKE_QUANTISERS",
    "GROUPED",
    "QUANTISERS",
    "QUANTISER_ROLES",
    "VALUE_ROLES",
    "Bounds",
    "Lookups",
    "bounds_of",
    "clip_codes",
    "scale_like",
]

ops = torch.ops.hqc
GROUPED = (ops.fake_quantize_grouped.default, ops.quantize_grouped.default, ops.dequantize_grouped.default)
"""With a scale for every group of channels; the last arguments are their axis and how many make a group."""
FAKE_QUANTISERS = (
    *(ops.fake_quantize.default, ops.fake_quantize_bounded.default, ops.fake_quantize_residual.default),
    ops.fake_quantize_grouped.default,
)
QUANTISERS = (ops.quantize.default, ops.quantize_bounded.default, ops.quantize_grouped.default)
"""Each with the arguments (x, scale, low, high): floats with gradients, and codes."""
DEQUANTISERS = (ops.dequantize.default, ops.dequantize_grouped.default)
VALUE_ROLES = ("activation_quantizer", "operand_quantizer", "softmax_quantizer")
"""Of quantisers of what depends on the input: of layers, and of q, k, v and softmax within attention."""
QUANTISER_ROLES = (*VALUE_ROLES, "weight_quantizer")
_MADE_OF = (
    *(aten.neg.default, aten.rsub.Scalar, aten.clamp.default, ops.round_ste.default),
    *(aten.minimum.default, aten.sub.Tensor),
)


@dataclass(frozen=True)
class Lookups:
    """Where bounds are tensors: their values [T], or [O] of a weight, and the nodes that hold a sample's own."""

    lows: Tensor
    highs: Tensor
    low: fx.Node
    high: fx.Node


@dataclass(frozen=True)
class Bounds:
    """The least and the largest code of a quantiser, over all rows where its range is looked up."""

    low: int
    high: int
    lookups: Lookups | None = None

    @property
    def largest(self) -> int:
        """The largest |code|.

        >>> Bounds(-8, 7).largest
        8
        """
        return max(-self.low, self.high)

    def of_row(self, row: int) -> tuple[int, int]:
        """At one row of the tables; one that has a single row serves all."""
        if self.lookups is None:
            return self.low, self.high
        row = row if len(self.lookups.lows) > 1 else 0
        return int(self.lookups.lows[row]), int(self.lookups.highs[row])

    @property
    def key(self) -> object:
        """Equal for equal bounds, so that equal codes are made once."""
        if self.lookups is None:
            return self.low, self.high
        return tuple(table.cpu().contiguous().numpy().tobytes() for table in (self.lookups.lows, self.lookups.highs))


def bounds_of(quantiser: fx.Node, program: Program) -> Bounds:
    """Of a node that quantises or fake-quantises, (x, scale, low, high): the one place that reads them.

    Raises:
        ExportError: for bounds that are no whole numbers, or made in a way that no pass makes them.
    """
    if is_op(quantiser, ops.softmax_quantize.default):
        return Bounds(0, 2 ** int(quantiser.args[3]) - 1)  # type: ignore[arg-type]
    low, high = quantiser.args[2:4]
    if isinstance(low, int) and isinstance(high, int):
        return Bounds(low, high)
    where = f"site {quantiser.meta.get('site', quantiser.name)}"
    if not isinstance(low, fx.Node) or not isinstance(high, fx.Node):
        found = low if not isinstance(low, int | fx.Node) else high
        raise ExportError(where, f"its code range ends at {found}, no whole number", "Quantise it with others.")
    lows, highs = (_values(bound, program, where) for bound in (low, high))
    for values in (lows, highs):
        if not values.numel() or not bool((values == values.round()).all() & values.isfinite().all()):
            raise ExportError(where, "its code range has ends that are no whole numbers", "Quantise it with others.")
    return Bounds(int(lows.min()), int(highs.max()), Lookups(lows, highs, low, high))


def _values(node: Any, program: Program, where: str) -> Tensor:
    """A bound over all rows: of a stored tensor, or of what `insert_qdq` makes of one."""
    if isinstance(node, fx.Node) and node.op == "get_attr" and str(node.target) in program.state:
        return program.state[str(node.target)].detach()
    if is_op(node, aten.index_select.default):
        return _values(node.args[0], program, where)
    if is_op(node, *_MADE_OF):
        given = (_values(one, program, where) if isinstance(one, fx.Node) else one for one in node.args)
        return node.target(*given)  # type: ignore[no-any-return]
    raise ExportError(where, f"its code range is made by {node}, which no pass writes", "Quantise it again with hqc.")


def clip_codes(levels: Tensor, low: Any, high: Any) -> Tensor:
    """Levels [N, …] clipped to a quantiser's bounds: two numbers, or two tensors [N]."""
    if isinstance(low, Tensor):
        return levels.clamp(per_first_axis(low, levels), per_first_axis(high, levels))
    return levels.clamp(low, high)


def scale_like(quantiser: fx.Node, scale: Tensor, x: Tensor) -> Tensor:
    """The scales of a node that quantises or dequantises so shaped that they multiply x: one a row, or one a group."""
    if not is_op(quantiser, *GROUPED):
        return per_first_axis(scale, x)
    axis, group = quantiser.args[-2:]
    return spread(scale, x, axis, group)  # type: ignore[arg-type]
