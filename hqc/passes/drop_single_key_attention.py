"""Drop attention over a single key: a softmax of one number is 1, so every query gets the value itself.

    before   y = x + W_o·softmax(q·kᵀ)·v + b      q [N, T, C];  k, v [N, 1, C]: a context of one token
    after    y = x + (W_o·v + b)                  [N, T, C] + [N, 1, C]

Exact: softmax over one entry is 1 whatever q and k are, and each row of a linear layer is computed by itself, so that T
equal rows are computed once. The token axis stays 1 through reshapes, transpositions, linear layers and arithmetic with
single numbers, and broadcasts in the first addition that meets all tokens. A reader that is not known to act on each
token by itself gets the T rows from an `expand` in front of it. The query and key projections have no reader then, and
go.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from hqc.attentions import argument_problem, attentions, attentions_by_fit
from hqc.passes.rewriting import LINEAR, Rewriter, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage, aten, is_op

__all__ = ["DropSingleKeyAttention"]

_RESHAPES = (aten.reshape.default, aten.view.default)
_ARITHMETIC = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.mul.Scalar,
    aten.div.Scalar,
)
_COPIES = (aten.to.dtype, aten.clone.default, aten.contiguous.default)


@dataclass(frozen=True)
class DropSingleKeyAttention:
    """Replaces attention over one key by its value, and computes what follows once for all tokens."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Attentions over one key, named by the module that holds their projections; the others are misses."""
        matches, misses = attentions_by_fit(program, _unfit)
        return Findings(tuple(matches), tuple(misses))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Narrows what reads these attentions, then puts their values in their place."""
        if not matches:
            return program
        edit = rewrite(program)
        dropped = [node for name, node in attentions(edit.graph) if name in matches]
        narrowing = _Narrowing(edit)
        for node in list(edit.graph.nodes):
            if node in dropped:
                narrowing.begin(node)
            else:
                narrowing.sink(node)
        for node in dropped:
            node.replace_all_uses_with(node.args[2])  # type: ignore[arg-type]
            edit.graph.erase_node(node)  # dead code elimination keeps an operator that may draw random numbers
        return edit.finish()


def _unfit(node: fx.Node) -> str:
    """Why an attention is left alone, or nothing."""
    read: tuple[Any, ...] = node.args[:3]
    query, key, value = (tuple(n.meta.get("shape", ())) for n in read)
    result = tuple(node.meta.get("shape", ()))
    if len(key) < 2 or isinstance(key[-2], str):
        return "the number of its keys is not known before it runs"
    if key[-2] != 1:
        return f"attention over {key[-2]} keys"
    if isinstance(query[-2], str):
        return "the number of its queries is not known before it runs"
    if value != (*result[:-2], 1, result[-1]):
        return f"its value {list(value)} does not fit its result {list(result)}: only the tokens may be broadcast"
    return argument_problem(node)


@dataclass
class _Narrowing:
    """The nodes that hold one row for all tokens: which axis, how many rows it stands for, the `expand` of it."""

    edit: Rewriter
    axis: dict[fx.Node, int] = field(default_factory=dict)
    rows: dict[fx.Node, int] = field(default_factory=dict)
    wide: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def begin(self, attention: fx.Node) -> None:
        """Takes the value's shape for an attention's."""
        shape, value = attention.meta["shape"], attention.args[2]
        if value in self.axis:
            attention.replace_input_with(value, self._widened(value, attention))  # type: ignore[arg-type]
        if shape[-2] != 1:
            self._mark(attention, len(shape) - 2)

    def sink(self, node: fx.Node) -> None:
        """Computes `node` on one row if it reads one, or gives it all rows."""
        read = [n for n in node.all_input_nodes if n in self.axis]
        if not read or self._broadcasts(node, read):
            return
        axis = self._axis_after(node, read)
        if axis is not None:
            self._mark(node, axis)
            return
        for source in read:
            node.replace_input_with(source, self._widened(source, node))

    def _mark(self, node: fx.Node, axis: int) -> None:
        shape = list(node.meta["shape"])
        self.axis[node], self.rows[node], shape[axis] = axis, shape[axis], 1
        node.meta = {**node.meta, "shape": tuple(shape)}

    def _widened(self, source: fx.Node, reader: fx.Node) -> fx.Node:
        if source not in self.wide:
            shape, axis, rows = source.meta["shape"], self.axis[source], self.rows[source]
            sizes = [rows if i == axis else -1 for i in range(len(shape))]
            full = tuple(rows if i == axis else size for i, size in enumerate(shape))
            self.wide[source] = self.edit.call(
                reader, aten.expand.default, source, sizes, shape=full, dtype=source.meta["dtype"]
            )
        return self.wide[source]

    def _broadcasts(self, node: fx.Node, read: list[fx.Node]) -> bool:
        """Whether this is arithmetic with an operand that has all tokens: it needs nothing."""
        if not is_op(node, *_ARITHMETIC):
            return False
        places = {self._place(n) for n in read}
        others = [n for n in node.all_input_nodes if n not in self.axis]
        return len(places) == 1 and any(_size_at(n, *places) not in (1, None) for n in others)

    def _place(self, node: fx.Node) -> int:
        """The axis counted from the end, as broadcasting counts."""
        return len(node.meta["shape"]) - self.axis[node]

    def _axis_after(self, node: fx.Node, read: list[fx.Node]) -> int | None:
        """The token axis of the result if `node` acts on each token by itself; its arguments then fit one row."""
        source: Any = node.args[0] if node.args else None
        if is_op(node, *_ARITHMETIC):
            places = {self._place(n) for n in read}
            return len(node.meta["shape"]) - places.pop() if len(places) == 1 else None
        if read != [source]:
            return None
        axis, rank = self.axis[source], len(source.meta["shape"])
        if is_op(node, *_COPIES):
            return axis
        if is_op(node, aten.dropout.default):
            return axis if node.args[1] == 0 or not node.args[2] else None
        if is_op(node, LINEAR):
            return axis if axis < rank - 1 else None
        if is_op(node, aten.transpose.int):
            one, other = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
            return {one: other, other: one}.get(axis, axis)
        if is_op(node, aten.permute.default):
            return [int(d) % rank for d in node.args[1]].index(axis)  # type: ignore[arg-type, union-attr]
        if is_op(node, *_RESHAPES):
            return self._reshaped(node, source)
        return None

    def _reshaped(self, node: fx.Node, source: fx.Node) -> int | None:
        """Where the token axis goes if a reshape neither splits nor merges it."""
        before, after, rows = source.meta["shape"], node.meta["shape"], self.rows[source]
        lead = _count(before[: self.axis[source]])
        for place, size in enumerate(after):
            if size == rows and _count(after[:place]) == lead:
                sizes = [1 if i == place else s for i, s in enumerate(node.args[1])]  # type: ignore[arg-type]
                node.args = (source, sizes)
                node.target = aten.reshape.default  # a view of a value need not be one of the attention's result
                return place
        return None


def _size_at(node: fx.Node, place: int) -> int | str | None:
    """The size of the axis at this place from the end; None without one."""
    shape = node.meta.get("shape", ())
    return shape[-place] if place <= len(shape) else None


def _count(sizes: Sequence[int | str]) -> tuple[int, tuple[str, ...]]:
    """A product of sizes in a form that can be compared: numbers multiplied, symbols sorted."""
    return math.prod(s for s in sizes if isinstance(s, int)), tuple(sorted(s for s in sizes if isinstance(s, str)))
