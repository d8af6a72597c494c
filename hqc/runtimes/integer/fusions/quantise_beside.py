"""A shortcut around a norm gets its codes from the norm's kernel, which reads the image anyway.

before   GroupNormQuantise(x), quantise(x)          conv1 of a ResNet block and its conv_shortcut
after    codes, beside = GroupNormQuantise(x)       x is read once
"""

from typing import ClassVar

from torch import fx

from hqc.runtimes.integer.fusions.fusion import Found, Match, Placed, calls_of, name_of
from hqc.runtimes.integer.layers import GroupNormQuantise, Quantise

__all__ = ["QuantiseBeside"]


class QuantiseBeside:
    """Saves a kernel and a pass over the image."""

    name: ClassVar[str] = "quantise_beside"

    def find(self, placed: Placed) -> Found:
        """Quantisers of an image that a group norm reads as well, before them."""
        found, norms = Found(), dict(self._norms(placed))
        for node, module in calls_of(placed, Quantise):
            norm = norms.get((node.args[0], node.kwargs.get("second"))) if module.image else None
            if norm is None:
                continue
            scale = node.args[1]
            assert isinstance(scale, fx.Node)
            if not placed.comes_before(norm, node):
                found.miss(name_of(node), "it stands before the norm that reads the same image")
            elif not placed.comes_before(scale, norm):
                found.miss(name_of(node), "its scale is computed after the norm that reads the same image")
            else:
                del norms[node.args[0], node.kwargs.get("second")]
                found.matches.append(Match(name_of(node), (node, norm)))
        return found

    def _norms(self, placed: Placed) -> list[tuple[tuple[object, object], fx.Node]]:
        """Norms that give codes, by what they read."""
        calls = calls_of(placed, GroupNormQuantise)
        return [((n.args[0], n.kwargs.get("second")), n) for n, module in calls if module.codes is not None]

    def apply(self, placed: Placed, match: Match) -> None:
        """The norm gets one output more."""
        node, norm = match.nodes
        quantise, module = placed.modules[node.target], placed.modules[norm.target]
        assert isinstance(quantise, Quantise)
        assert isinstance(module, GroupNormQuantise)
        alone = len(module.outputs) == 1
        module.beside = quantise.codes
        norm.update_kwarg("beside_scale", node.args[1])
        if alone:
            codes = placed.item(norm, 0, dtype="int8")
            norm.replace_all_uses_with(codes, delete_user_cb=lambda user: user is not codes)
        beside = placed.item(norm, module.outputs.index("beside"), dtype="int8")
        beside.meta["site"] = node.meta.get("site")
        node.replace_all_uses_with(beside)
        placed.erase([node])
