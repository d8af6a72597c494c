"""A product whose output is only quantised writes the codes itself.

before   quantise(product(codes, s, [r]))             r, SiLU and shift as they are
after    product(codes, s, [r], inverse_scale)        codes out
before   quantise(permute(reshape(product(…))))       tokens back into an image before a 1×1 convolution
after    reshape(product(…, inverse_scale))
"""

from typing import ClassVar

from torch import fx

from hqc.program import aten, is_op
from hqc.runtimes.integer.fusions.fusion import Found, Match, Placed, calls_of, is_reshape, name_of, only_reader
from hqc.runtimes.integer.layers import IntegerConv2d, Quantise

__all__ = ["WIDEST_BLOCK", "CodesFromProducts"]

WIDEST_BLOCK = 128
"""A product's tile holds whole blocks of the rotation of its outputs, and no more outputs than this."""


class CodesFromProducts:
    """Saves writing the floats and reading them again."""

    name: ClassVar[str] = "codes_from_products"

    def find(self, placed: Placed) -> Found:
        """Quantisers of a product that nobody else reads."""
        found = Found()
        for node, module in calls_of(placed, Quantise):
            if node.kwargs:
                continue
            product, reshape = _source(node, module)
            layer = placed.layer(product)
            if layer is None:
                continue
            # One that gives statistics has several readers too, and one that gives codes is read by no quantiser.
            if only_reader(product) is None:
                found.miss(name_of(node), "something else reads the product")
            elif isinstance(layer, IntegerConv2d) != (module.image and reshape is None):
                found.miss(name_of(node), "it reads the product's axes in another order")
            elif module.codes.block > WIDEST_BLOCK:
                found.miss(name_of(node), f"its rotation is wider than a tile of {WIDEST_BLOCK} outputs")
            else:
                found.matches.append(Match(name_of(node), (node, product, reshape)))
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """The product stands where the quantiser stood, which its scale and residual come before."""
        node, product, reshape = match.nodes
        layer = placed.layer(product)
        assert layer is not None
        layer.quantised = placed.codes_of(node)
        with placed.edit.graph.inserting_before(node):
            moved = placed.edit.graph.call_module(
                product.target, product.args, {**product.kwargs, "inverse_scale": node.args[1]}
            )
        moved.meta = {"site": product.meta.get("site"), "dtype": "int8", "role": "codes"}
        codes = moved
        if reshape is not None:
            codes = placed.edit.call(node, reshape.target, moved, *reshape.args[1:], dtype="int8")
        node.replace_all_uses_with(codes)
        between = [node, *([node.args[0], reshape] if reshape is not None else []), product]
        placed.erase(between)


def _source(node: fx.Node, module: Quantise) -> tuple[fx.Node, fx.Node | None]:
    """(what a quantiser reads, the reshape between): a permutation of tokens to an image moves no channel."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if module.image and is_op(x, aten.permute.default) and list(x.args[1]) == [0, 3, 1, 2]:  # type: ignore[arg-type]
        reshape = x.args[0]
        assert isinstance(reshape, fx.Node)
        if is_reshape(reshape) and only_reader(x) is not None and only_reader(reshape) is not None:
            before = reshape.args[0]
            assert isinstance(before, fx.Node)
            if before.meta.get("shape", (0,))[-1] == reshape.meta.get("shape", (1,))[-1]:
                return before, reshape
    return x, None
