"""A program's graph as stable text, one line a node: for golden tests, reviews and `diff`.

    %sample: float32[N, 3, 8, 8] = placeholder()
    %conv_weight: float32[8, 3, 3, 3] = get_attr(conv.weight)
    %conv2d: float32[N, 8, 8, 8] = aten.conv2d.default(%sample, %conv_weight, None, [1, 1])  # layer conv

The text depends on the graph alone: not on the values of weights, on the time, or on the machine.
"""

from typing import Any

import torch
from torch import fx

from hqc.program import Program

__all__ = ["graph_text"]


def graph_text(program: Program) -> str:
    """The graph in execution order, one line a node, ending in a newline."""
    return "".join(f"{_line(node)}\n" for node in program.graph.nodes)


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    note = " ".join(str(node.meta[key]) for key in ("role", "site") if key in node.meta)
    return f"%{node.name}{_type(node)} = {_call(node)}{f'  # {note}' if note else ''}"


def _type(node: fx.Node) -> str:
    if "shape" not in node.meta:
        return ""
    return f": {node.meta.get('dtype', '?')}[{', '.join(map(str, node.meta['shape']))}]"


def _call(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "placeholder()"
    if node.op == "get_attr":
        return f"get_attr({node.target})"
    arguments = [_argument(value) for value in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    return f"{_target(node.target)}({', '.join(arguments)})"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '').lstrip('_')}.{getattr(target, '__name__', target)}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
    return str(value) if isinstance(value, (torch.dtype, torch.device)) else repr(value)
