"""What a captured graph does that changes no value: taken out before kernels are placed, so that patterns meet.

dropout in evaluation, x/1, x·1, x + 0, to its own dtype        → x
contiguous, clone, alias, detach                             → x     (the graph is functional; kernels read strides)
view                                                         → reshape   (a channels-last tensor may not be viewed)
two equal calls on equal arguments                           → one
"""

from typing import Any

import torch
from torch import fx

from hqc.passes.rewriting import rewrite
from hqc.program import Program, aten, is_op

__all__ = ["tidied"]

_COPIES = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
_NEUTRAL = {
    aten.div.Tensor: 1,
    aten.mul.Tensor: 1,
    aten.div.Scalar: 1,
    aten.mul.Scalar: 1,
    aten.add.Tensor: 0,
    aten.sub.Tensor: 0,
    aten.add.Scalar: 0,
}


def tidied(program: Program) -> Program:
    """The same function in fewer nodes."""
    edit = rewrite(program)
    if any(_mutates(node) for node in edit.graph.nodes):
        return program
    seen: dict[Any, fx.Node] = {}
    for node in list(edit.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        same = node.args[0] if _is_identity(node) else seen.setdefault(_key(node), node)
        if same is not node:
            node.replace_all_uses_with(same)
            edit.graph.erase_node(node)
    return edit.finish()


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def _key(node: fx.Node) -> Any:
    """Equal for calls that give equal values; a site's own nodes are kept, its name is theirs."""
    return node.target, node.meta.get("site"), repr(node.args), repr(node.kwargs)


def _is_identity(node: fx.Node) -> bool:
    if is_op(node, *_COPIES):
        return True
    if is_op(node, aten.dropout.default):
        return node.args[2] is False or bool(node.args[1] == 0)
    if is_op(node, aten.to.dtype):
        source = node.args[0].meta.get("dtype")  # type: ignore[union-attr]
        return source is not None and source == node.meta.get("dtype")
    if node.target not in _NEUTRAL or len(node.args) < 2 or node.kwargs.get("rounding_mode") is not None:
        return False
    x, number = node.args[:2]
    neutral = type(number) in (int, float) and bool(number == _NEUTRAL[node.target])
    return neutral and isinstance(x, fx.Node) and x.meta.get("dtype") == node.meta.get("dtype") == "float32"
