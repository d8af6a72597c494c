"""Quantisers read the two parts of a concatenation where they lie, and it is never written.

before   quantise(cat([a, b], 1)), GroupNormQuantise(cat([a, b], 1))
after    quantise(a, second=b),    GroupNormQuantise(a, second=b)
"""

from typing import ClassVar

from torch import fx

from hqc.program import aten, is_op
from hqc.runtimes.integer.fusions.fusion import Found, Match, Placed, name_of, readers
from hqc.runtimes.integer.layers import GroupNormQuantise, Quantise

__all__ = ["ReadBoth"]


class ReadBoth:
    """Skip connections of a UNet: saves writing them side by side."""

    name: ClassVar[str] = "read_both"

    def find(self, placed: Placed) -> Found:
        """Concatenations of two images along the channels that only quantisers read."""
        found = Found()
        for node in placed.edit.graph.nodes:
            if not is_op(node, aten.cat.default) or len(node.meta.get("shape", ())) != 4:
                continue
            parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
            modules = [placed.module(reader) for reader in readers(node)]
            quantisers = [
                m for m in modules if isinstance(m, GroupNormQuantise) or (isinstance(m, Quantise) and m.image)
            ]
            if axis not in (1, -3) or not quantisers:
                continue
            if len(parts) != 2:
                found.miss(name_of(readers(node)[0]), f"it reads {len(parts)} tensors side by side, not two")
            elif len(quantisers) < len(modules):
                found.miss(name_of(readers(node)[0]), "something else reads the concatenation, which is written anyway")
            else:
                found.matches.append(Match(name_of(readers(node)[0]), (node,)))
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """Gives both parts to every reader."""
        (node,) = match.nodes
        first, second = node.args[0]
        assert isinstance(first, fx.Node)
        for reader in readers(node):
            reader.update_arg(0, first)
            reader.update_kwarg("second", second)
        placed.erase([node])
