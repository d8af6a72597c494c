"""One look-up for all scale tables: tables side by side, one Gather, then one Split for each form that sites ask for.

    tables [T] of S sites -> [T, S] -> Gather(row [N]) -> [N, S] -> scales [N, 1, …], reciprocals [N, 1, …],
                                                                    rotations (H_b/√b)/s [N, 1, b, b]

A look-up of its own for every site would cost several tiny nodes each. Equal tables share a column, and with it
everything that is computed from it: q, k and v of an attention read one tensor, and calibration gives them one table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from torch import fx

from hqc.export.lowering import Lowering
from hqc.ops import hadamard_matrix
from hqc.program import Program, aten, is_op
from hqc.rotations import Rotation

__all__ = ["Form", "ScaleBank", "lookup_key", "rotation_form", "rotation_matrix"]

Form = tuple[Literal["scale", "number", "reciprocal", "rotation", "rotation_regular"], int]
"""A scale or its reciprocal for a tensor of some rank, one number [1] for the whole batch, a rotation of some order."""


def rotation_form(rotation: Rotation) -> Form:
    """The form of a scale that is folded into a rotation."""
    return ("rotation_regular" if rotation.regular else "rotation"), rotation.block


def rotation_matrix(rotation: Rotation) -> np.ndarray:  # type: ignore[type-arg]
    """H_b/√b in float32."""
    return (hadamard_matrix(rotation).numpy() * np.float32(rotation.block**-0.5)).astype(np.float32)


@dataclass
class _Group:
    """The distinct tables that one row index looks up in one form, and the values once they are emitted."""

    tables: dict[bytes, fx.Node] = field(default_factory=dict)
    parts: tuple[ir.Value, ...] = ()


def lookup_key(program: Program, lookup: fx.Node) -> tuple[fx.Node, bytes] | None:
    """(row, content of the table) of a look-up in a stored table [T]; equal keys give equal scales. None for others."""
    if not is_op(lookup, aten.index_select.default) or lookup.args[1] != 0:
        return None
    table, row = lookup.args[0], lookup.args[2]
    assert isinstance(table, fx.Node)
    assert isinstance(row, fx.Node)
    if table.op != "get_attr" or program.state[str(table.target)].ndim != 1:
        return None
    return row, program.state[str(table.target)].cpu().contiguous().numpy().tobytes()


class ScaleBank:
    """The scale of each activation in the forms that `requests` names for every look-up."""

    def __init__(self, lowering: Lowering, requests: Sequence[tuple[fx.Node, Form]]) -> None:
        self._lowering = lowering
        self._keys: dict[fx.Node, tuple[fx.Node, bytes]] = {}
        self._groups: dict[tuple[fx.Node, Form], _Group] = {}
        for lookup, form in requests:
            key = lookup_key(lowering.program, lookup)
            if key is not None:
                self._keys[lookup] = key
                self._groups.setdefault((key[0], form), _Group()).tables.setdefault(key[1], lookup)

    def holds(self, node: fx.Node) -> bool:
        """Whether a look-up is served by the bank."""
        return node in self._keys

    def value(self, lookup: fx.Node, form: Form) -> ir.Value:
        """A scale in the given form."""
        lo = self._lowering
        if lookup not in self._keys:
            return _shaped(lo, lo.builder.reshape(lo.value(lookup), [-1, 1]), form)
        row, table = self._keys[lookup]
        group = self._groups[row, form]
        if not group.parts:
            group.parts = self._emit(row, group, form)
        return group.parts[list(group.tables).index(table)]

    def _emit(self, row: fx.Node, group: _Group, form: Form) -> tuple[ir.Value, ...]:
        lo, b = self._lowering, self._lowering.builder
        columns = [b.reshape(lo.value(lookup.args[0]), [-1, 1]) for lookup in group.tables.values()]
        tables = b.op("Concat", *columns, axis=1) if len(columns) > 1 else columns[0]
        picked = b.op("Gather", tables, lo.value(row), axis=0, name=f"{form[0]}_{form[1]}")
        shaped = _shaped(lo, picked, form)
        if len(columns) == 1:
            return (shaped,)
        axis = 0 if form[0] == "number" else 1
        return b.ops("Split", shaped, b.ints(*[1] * len(columns)), count=len(columns), axis=axis)


def _shaped(lo: Lowering, scales: ir.Value, form: Form) -> ir.Value:
    """[N, S] in a form: [N, S, 1, …] of the rank, or [N, S, b, b]."""
    b = lo.builder
    kind, size = form
    if kind == "number":
        return b.reshape(scales, [-1])
    if kind == "scale":
        return b.reshape(scales, [0, 0] + [1] * (size - 2))
    inverse = b.op("Reciprocal", scales)
    if kind == "reciprocal":
        return b.reshape(inverse, [0, 0] + [1] * (size - 2))
    matrix = b.constant(rotation_matrix(Rotation(size, kind == "rotation_regular")), f"{kind}_{size}")
    return b.op("Mul", matrix, b.reshape(inverse, [0, 0, 1, 1]))
