"""Products write the statistics of what they write, so that a group norm need not read it once more.

before   GroupNormQuantise(product(codes, s))                          a pass for the statistics, one for the norm
after    y, t = product(codes, s); GroupNormQuantise(y, statistics=t)
"""

from typing import ClassVar

from torch import fx

from hqc.runtimes.integer.fusions.fusion import Found, Match, Placed, calls_of, name_of
from hqc.runtimes.integer.layers import GroupNormQuantise, IntegerConv2d

__all__ = ["StatisticsFromProducts"]

_WRITTEN = ("statistics", "second_statistics")
"""A group norm's statistics; those of its first argument and of `second`."""


class StatisticsFromProducts:
    """Per-channel mean and deviations from the epilogue, in a fixed order: the same bits every run."""

    name: ClassVar[str] = "statistics_from_products"

    def find(self, placed: Placed) -> Found:
        """Norms of what a convolution wrote; a concatenation has two writers."""
        found = Found()
        for node, _ in calls_of(placed, GroupNormQuantise):
            for keyword in _WRITTEN:
                x = _image(node, keyword)
                if x is None:
                    continue
                layer = placed.layer(x)
                if not isinstance(layer, IntegerConv2d) or layer.quantised is not None:
                    found.miss(name_of(node), "no integer convolution writes the floats that it reads")
                else:
                    found.matches.append(Match(name_of(node), (node, keyword)))
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """Asks the product for them, once for all that read it."""
        node, keyword = match.nodes
        x = _image(node, keyword)
        assert x is not None
        layer = placed.layer(x)
        if layer is not None:
            # The first norm that reads this product: from now on it has two outputs.
            layer.statistics = True
            floats = placed.item(x, 0, shape=x.meta["shape"], dtype=x.meta["dtype"])
            x.replace_all_uses_with(floats, delete_user_cb=lambda user: user is not floats)
            statistics = placed.item(x, 1)
        else:
            (product,) = x.all_input_nodes
            statistics = next(user for user in product.users if user.args[1] == 1)
        node.update_kwarg(keyword, statistics)


def _image(norm: fx.Node, keyword: str) -> fx.Node | None:
    """What a group norm reads that some statistics would be of."""
    x = norm.args[0] if keyword == "statistics" else norm.kwargs.get("second")
    return x if isinstance(x, fx.Node) else None
