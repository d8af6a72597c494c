"""Norms write the codes of what they compute.

    before   quantise(silu(group_norm(x)))        three passes over memory, and a copy to NCHW and back
    after    GroupNormQuantise(x)                 one pass; statistics from the products that wrote x, or a pass more
    before   quantise(layer_norm(x))
    after    LayerNormQuantise(x)

Where something else reads the norm too, both outputs are kept. A group norm that nothing quantises runs channels-last
by the same kernel.
"""

from typing import Any, ClassVar

from torch import fx

from hqc.kernels import GroupNorm, LayerNorm
from hqc.program import aten, is_op
from hqc.runtimes.integer.fusions.fusion import Found, Match, Placed, name_of, only_reader, readers
from hqc.runtimes.integer.layers import GroupNormQuantise, LayerNormQuantise, Quantise

__all__ = ["QuantiseGroupNorm", "QuantiseLayerNorm"]

_WIDEST_ROW = 16384


class QuantiseGroupNorm:
    """Group norm, SiLU and quantisation of channels-last images."""

    name: ClassVar[str] = "quantise_group_norm"

    def find(self, placed: Placed) -> Found:
        """Group norms of images; a miss is one of another shape."""
        found = Found()
        for node in placed.edit.graph.nodes:
            if not is_op(node, aten.group_norm.default):
                continue
            last = only_reader(node)
            silu = last is not None and is_op(last, aten.silu.default)
            result = last if silu and last is not None else node
            quantiser = _quantiser(placed, result, image=True)
            name = name_of(quantiser or result)
            if len(node.meta.get("shape", ())) != 4:
                found.miss(name, f"the norm is of {len(node.meta.get('shape', ()))} axes, not of an image's four")
            elif not placed.is_stored(*node.args[2:4]):
                found.miss(name, "its weight or bias is computed, not stored")
            elif (_argument(node, 2) is None) != (_argument(node, 3) is None):
                found.miss(name, "it has a weight or a bias alone")
            elif quantiser is not None and not _scale_in_time(placed, result, quantiser):
                found.miss(name, "its scale is computed after another reader of the norm")
            else:
                found.matches.append(Match(name, (node, result, silu, quantiser)))
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """One call in the place of norm, SiLU and quantiser."""
        node, result, silu, quantiser = match.nodes
        eps = _argument(node, 4)
        affine = (placed.tensor(_argument(node, 2)), placed.tensor(_argument(node, 3)))
        norm = GroupNorm(node.args[1], 1e-5 if eps is None else eps, *affine, silu=silu)
        kernels = placed.kernels
        if quantiser is None:
            floats = placed.call(result, GroupNormQuantise(kernels, norm, None, keep=False), node.args[:1], result)
            result.replace_all_uses_with(floats)
        else:
            keep = len(readers(result)) > 1
            module = GroupNormQuantise(kernels, norm, placed.codes_of(quantiser), keep=keep)
            _replace(placed, module, (node.args[0], quantiser.args[1]), result, quantiser)
        placed.erase([result, node])


class QuantiseLayerNorm:
    """Layer norm and quantisation of rows."""

    name: ClassVar[str] = "quantise_layer_norm"

    def find(self, placed: Placed) -> Found:
        """Quantised layer norms over the last axis."""
        found = Found()
        for node in placed.edit.graph.nodes:
            if not is_op(node, aten.layer_norm.default):
                continue
            quantiser = _quantiser(placed, node, image=False)
            if quantiser is None:
                found.miss(name_of(node), "nothing quantises the norm's result as it is")
            elif len(node.args[1]) != 1 or int(node.args[1][0]) > _WIDEST_ROW:  # type: ignore[arg-type, index]
                wanted = f"not over one axis of at most {_WIDEST_ROW}"
                found.miss(name_of(quantiser), f"the norm is over {node.args[1]}, {wanted}")
            elif not placed.is_stored(*node.args[2:4]):
                found.miss(name_of(quantiser), "its weight or bias is computed, not stored")
            elif (_argument(node, 2) is None) != (_argument(node, 3) is None):
                found.miss(name_of(quantiser), "it has a weight or a bias alone")
            elif not _scale_in_time(placed, node, quantiser):
                found.miss(name_of(quantiser), "its scale is computed after another reader of the norm")
            else:
                found.matches.append(Match(name_of(quantiser), (node, quantiser)))
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """One call in the place of norm and quantiser."""
        node, quantiser = match.nodes
        eps = _argument(node, 4)
        affine = (placed.tensor(_argument(node, 2)), placed.tensor(_argument(node, 3)))
        norm = LayerNorm(1e-5 if eps is None else eps, *affine)
        keep = len(readers(node)) > 1
        module = LayerNormQuantise(placed.kernels, norm, placed.codes_of(quantiser), keep=keep)
        _replace(placed, module, (node.args[0], quantiser.args[1]), node, quantiser)
        placed.erase([node])


def _replace(placed: Placed, module: Any, args: tuple[Any, ...], result: fx.Node, quantiser: fx.Node) -> None:
    """`module` gives the quantiser's codes and, with `keep`, the floats of `result` to whoever else reads them."""
    call = placed.call(_place(placed, result, quantiser), module, args, quantiser)
    if not module.keep:
        quantiser.replace_all_uses_with(call)
        placed.erase([quantiser])
        return
    floats = placed.item(call, 1, shape=result.meta["shape"], dtype=result.meta["dtype"])
    codes = placed.item(call, 0, dtype="int8")
    quantiser.replace_all_uses_with(codes)
    placed.erase([quantiser])
    result.replace_all_uses_with(floats, delete_user_cb=lambda user: user is not call)


def _place(placed: Placed, result: fx.Node, quantiser: fx.Node) -> fx.Node:
    """The first reader of a norm's result."""
    among = set(readers(result)) | {quantiser}
    first: fx.Node = next(node for node in placed.edit.graph.nodes if node in among)
    return first


def _scale_in_time(placed: Placed, result: fx.Node, quantiser: fx.Node) -> bool:
    """Whether the quantiser's scale is there where its norm must be computed."""
    scale = quantiser.args[1]
    assert isinstance(scale, fx.Node)
    return placed.comes_before(scale, _place(placed, result, quantiser))


def _quantiser(placed: Placed, node: fx.Node, *, image: bool) -> fx.Node | None:
    """The first quantiser that reads a node."""
    for reader in readers(node):
        module = placed.module(reader)
        if isinstance(module, Quantise) and module.image == image and reader.args[0] is node:
            return reader
    return None


def _argument(node: fx.Node, index: int) -> Any:
    return node.args[index] if index < len(node.args) else None
