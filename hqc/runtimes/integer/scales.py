"""The scales of all sites in one look-up.

    tables [T] of S sites  →  bank [2·S, T] = tables, then their reciprocals  →  look_up(row [N])  →  [2·S, N]

A site reads two rows of the result, [N] each: its scale and 1/scale. Equal tables share a row, and with it everything
that is quantised by it: q, k and v of an attention read one tensor, and calibration gives them one table.

    1/scale, least and largest code of R sites with a range of their own at each timestep, [R, T, 3]  →  [R, N, 3]

Such a site's quantiser reads one [N, 3] of a second look-up in the place of 1/scale.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.nn import functional

from hqc.bounds import Bounds
from hqc.errors import ExportError
from hqc.export.scale_bank import lookup_key
from hqc.passes.rewriting import Rewriter
from hqc.program import BATCH, aten
from hqc.sites import QuantisedSite

__all__ = ["Bank", "look_up", "scale_banks"]

_ALIGNED = 4  # float32 numbers in 16 bytes


def look_up(bank: Tensor, row: Tensor) -> Tensor:
    """bank[:, row], [2·S, N] or [R, N, 3].

    Every row at a multiple of 16 bytes, since triton compiles again for one that is not.
    """
    padded = functional.pad(row, (0, -len(row) % _ALIGNED))
    return bank.index_select(1, padded)[:, : len(row)]


@dataclass
class Bank:
    """The tables that one row index looks up, and the node that does."""

    tables: dict[object, Tensor] = field(default_factory=dict)
    picked: fx.Node | None = None
    rows: dict[int, fx.Node] = field(default_factory=dict)


@dataclass
class ScaleBanks:
    """Scale and reciprocal of every look-up of the given graph."""

    edit: Rewriter
    keys: dict[fx.Node, tuple[fx.Node, bytes]]
    banks: dict[fx.Node, Bank]
    steps: dict[fx.Node, Bank]
    others: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def scale(self, lookup: fx.Node) -> fx.Node:
        """fp32 [N]."""
        return self._row(lookup, reciprocal=False) if lookup in self.keys else lookup

    def inverse(self, lookup: fx.Node, bounds: Bounds) -> fx.Node:
        """1/scale, fp32 [N], divided once: the same division that `hqc::quantize` does; with its bounds [N, 3]."""
        if bounds.lookups is not None:
            return self._step(lookup, bounds)
        if lookup in self.keys:
            return self._row(lookup, reciprocal=True)
        if lookup not in self.others:
            self.others[lookup] = _call(self.edit, lookup.next, aten.reciprocal.default, lookup)
        return self.others[lookup]

    def _step(self, lookup: fx.Node, bounds: Bounds) -> fx.Node:
        row, table = self.keys[lookup]
        bank = self.steps[row]
        if bank.picked is None:
            tables = torch.stack(list(bank.tables.values()))
            behind, shape = row.next, (len(tables), BATCH, 3)
            stored = self.edit.weight(f"step_bank.{row.name}", tables, behind)
            bank.picked = self.edit.call(behind, look_up, stored, row, shape=shape, dtype="float32")
        index = list(bank.tables).index((table, bounds.key))
        if index not in bank.rows:
            behind = bank.picked.next
            picked = self.edit.call(behind, aten.select.int, bank.picked, 0, index, shape=(BATCH, 3), dtype="float32")
            bank.rows[index] = picked
        return bank.rows[index]

    def _row(self, lookup: fx.Node, *, reciprocal: bool) -> fx.Node:
        row, table = self.keys[lookup]
        bank = self.banks[row]
        if bank.picked is None:
            bank.picked = self._look_up(row, bank)
        index = list(bank.tables).index(table) + (len(bank.tables) if reciprocal else 0)
        if index not in bank.rows:
            bank.rows[index] = _call(self.edit, bank.picked.next, aten.select.int, bank.picked, 0, index)
        return bank.rows[index]

    def _look_up(self, row: fx.Node, bank: Bank) -> fx.Node:
        tables = torch.stack(list(bank.tables.values()))
        behind = row.next
        stored = self.edit.weight(f"scale_bank.{row.name}", torch.cat([tables, tables.reciprocal()]), behind)
        shape = (len(tables) * 2, BATCH)
        return self.edit.call(behind, look_up, stored, row, shape=shape, dtype="float32")


def scale_banks(edit: Rewriter, sites: list[QuantisedSite]) -> ScaleBanks:
    """The banks of some sites; a scale that is no look-up in a stored table is read as it is.

    Raises:
        ExportError: for looked-up bounds beside such a scale.
    """
    program = edit.program.evolve(graph=edit.graph)
    keys, banks, steps = {}, dict[fx.Node, Bank](), dict[fx.Node, Bank]()
    for site in sites:
        lookup: fx.Node = site.quantiser.args[1]  # type: ignore[assignment]
        key, found = lookup_key(program, lookup), site.bounds.lookups
        if key is not None:
            keys[lookup] = key
            table = program.state[str(lookup.args[0].target)].detach().to(torch.float32)  # type: ignore[union-attr]
            banks.setdefault(key[0], Bank()).tables.setdefault(key[1], table)
            if found is not None:
                step = torch.stack([table.reciprocal(), found.lows, found.highs], 1)
                steps.setdefault(key[0], Bank()).tables.setdefault((key[1], site.bounds.key), step)
        elif found is not None:
            raise ExportError(
                f"site {site.site}", "its activation scale is not looked up from a table", "Use insert_qdq's tables."
            )
    return ScaleBanks(edit, keys, banks, steps)


def _call(edit: Rewriter, before: fx.Node, target: object, *args: object) -> fx.Node:
    return edit.call(before, target, *args, shape=(BATCH,), dtype="float32")
