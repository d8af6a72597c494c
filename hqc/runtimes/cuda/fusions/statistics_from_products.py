"""Products write the statistics of what they write, so that a group norm need not read it once more.

before   GroupNormQuantise(product(codes, s))                          a pass for the statistics, one for the norm
after    y, t = product(codes, s); GroupNormQuantise(y, statistics=t)
"""

from typing import ClassVar

from torch import fx

from hqc.runtimes.cuda.fusions.fusion import Found, Match, Placed, calls_of, name_of
from hqc.runtimes.cuda.layers import GroupNormQuantise, IntegerConv2d

__all__ = ["StatisticsFromProducts"]

_INPUTS = {"statistics": 0, "second_statistics": "second"}


class StatisticsFromProducts:
    """Per-channel mean and deviations from the epilogue, in a fixed order: the same bits every run."""

    name: ClassVar[str] = "statistics_from_products"

    def find(self, placed: Placed) -> Found:
        """Norms of what a convolution wrote; a concatenation has two writers."""
        found = Found()
        for node, _ in calls_of(placed, GroupNormQuantise):
            for keyword, key in _INPUTS.items():
                x = node.args[key] if isinstance(key, int) else node.kwargs.get(key)
                if x is None:
                    continue
                assert isinstance(x, fx.Node)
                layer = placed.module(x)
                if not isinstance(layer, IntegerConv2d) or layer.quantised is not None:
                    found.miss(name_of(node), f"{x.name} is not written by an integer convolution")
                else:
                    found.matches.append(Match(name_of(node), (node, keyword, key)))
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """Asks the product for them, once for all that read it."""
        node, keyword, key = match.nodes
        x = node.args[key] if isinstance(key, int) else node.kwargs[key]
        layer = placed.module(x)
        if isinstance(layer, IntegerConv2d):
            # The first norm that reads this product: from now on it has two outputs.
            layer.statistics = True
            floats = placed.item(x, 0, shape=x.meta["shape"], dtype=x.meta["dtype"])
            x.replace_all_uses_with(floats, delete_user_cb=lambda user: user is not floats)
            statistics = placed.item(x, 1)
        else:
            product = x.args[0]
            statistics = next(user for user in product.users if user.args[1] == 1)
        node.update_kwarg(keyword, statistics)
