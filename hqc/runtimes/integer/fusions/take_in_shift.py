"""A vector a sample that is added to a product is added by the product's epilogue.

before   product(codes, s, [r]) + v[:, :, None, None]     the time embedding of a ResNet block
         product(codes, s, [r]) + v[:, None, :]           cross-attention to one token
after    product(codes, s, [r], shift=v), v [N, O]
"""

from typing import ClassVar

from torch import fx

from hqc.program import aten, is_op
from hqc.runtimes.integer.fusions.fusion import Found, Match, Placed, name_of, only_reader
from hqc.runtimes.integer.layers import IntegerConv2d, IntegerLayer

__all__ = ["TakeInShift"]


class TakeInShift:
    """Saves a pass over the image, and lets the product see what a group norm reads next."""

    name: ClassVar[str] = "take_in_shift"

    def find(self, placed: Placed) -> Found:
        """Additions of a broadcast vector to a product that nobody else reads."""
        found = Found()
        for node in placed.edit.graph.nodes:
            terms = node.all_input_nodes
            if not is_op(node, aten.add.Tensor) or node.kwargs or len(terms) != 2:
                continue
            for product, vector in (terms, reversed(terms)):
                layer = placed.layer(product)
                if layer is None or not _is_vector(product, vector):
                    continue
                reason = _reason(layer, product)
                if reason:
                    found.miss(name_of(product), reason)
                else:
                    found.matches.append(Match(name_of(product), (node, product, vector)))
                break
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """The product moves to where the vector is there, and takes in a SiLU that follows."""
        addition, product, vector = match.nodes
        flat = _flat(placed, addition, vector)
        with placed.edit.graph.inserting_before(addition):
            moved = placed.edit.graph.call_module(str(product.target), product.args, {**product.kwargs, "shift": flat})
        moved.meta = dict(product.meta)
        addition.replace_all_uses_with(moved)
        placed.erase([addition, product])
        following, layer = only_reader(moved), placed.layer(moved)
        if layer is not None and following is not None and is_op(following, aten.silu.default):
            layer.silu = True
            following.replace_all_uses_with(moved)
            placed.erase([following])


def _is_vector(product: fx.Node, vector: fx.Node) -> bool:
    """Whether a tensor has one number for each sample and output of a product, and is broadcast over the rest."""
    whole, part = product.meta.get("shape"), vector.meta.get("shape")
    if whole is None or part is None or len(whole) != len(part) or whole == part or len(whole) < 3:
        return False
    channel = 1 if len(whole) == 4 else len(whole) - 1
    wanted = tuple(d if i in (0, channel) else 1 for i, d in enumerate(whole))
    return tuple(part) == wanted and vector.meta.get("dtype") == "float32"


def _reason(layer: IntegerLayer, product: fx.Node) -> str:
    if only_reader(product) is None:
        return "something else reads the product before the addition"
    if layer.silu or "shift" in product.kwargs or layer.quantised is not None:
        return "its epilogue is full: a SiLU or another vector comes first"
    conv = isinstance(layer, IntegerConv2d)
    return "" if conv == (len(product.meta["shape"]) == 4) else "it has other axes than its product"


def _flat(placed: Placed, before: fx.Node, vector: fx.Node) -> fx.Node:
    """[N, O] of [N, O, 1, 1] or [N, 1, O], without the axes that were added."""
    while is_op(vector, aten.unsqueeze.default):
        vector = vector.args[0]  # type: ignore[assignment]
    while len(vector.meta["shape"]) > 2:
        shape = vector.meta["shape"]
        axis = 1 if shape[1] == 1 else len(shape) - 1
        smaller = tuple(d for i, d in enumerate(shape) if i != axis)
        vector = placed.edit.call(before, aten.select.int, vector, axis, 0, shape=smaller, dtype="float32")
    return vector
