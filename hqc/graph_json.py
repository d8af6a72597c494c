"""The fx graph as JSON: names and operators are checked on the way in, nothing from the file is executed."""

import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from hqc.operators import ADMITTED
from hqc.program import ALLOWED_FUNCTIONS

__all__ = ["graph_from_json", "graph_to_json"]

_ENUMS: Mapping[str, type] = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    for name, kind in _ENUMS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"argument of type {type(value).__name__}")


_DEEPEST_ARGUMENT = 8


def _decode(value: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    if depth > _DEEPEST_ARGUMENT:
        raise ValueError("an argument is nested too deep")
    if isinstance(value, list):
        return [_decode(v, nodes, depth + 1) for v in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer does not fit 64 bits")
    if not isinstance(value, dict):
        return value
    ((kind, data),) = value.items()
    if kind == "node":
        return nodes[data]
    if kind == "float":
        return float(data)
    if kind == "device":
        if data != "cpu":
            raise ValueError(f"device {str(data)[:40]!r} is not the cpu, on which every graph is captured")
        return torch.device("cpu")
    expected = _ENUMS[kind]
    found = getattr(torch, data)
    if not isinstance(found, expected):
        raise ValueError(f"{data!r} is not a torch.{kind}")
    return found


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for name, function in ALLOWED_FUNCTIONS.items():
        if target is function:
            return name
    raise TypeError(f"call of {target}")


def _find_target(name: str) -> Any:
    if name in ALLOWED_FUNCTIONS:
        return ALLOWED_FUNCTIONS[name]
    match = re.fullmatch(r"(aten|hqc)\.(\w+)\.(\w+)", name)
    if match is None:
        raise ValueError(f"operator {name!r} is not one that a graph may call")
    target = getattr(getattr(getattr(torch.ops, match[1]), match[2]), match[3])
    if not isinstance(target, torch._ops.OpOverload):
        raise ValueError(f"{name!r} is not an operator")
    if target._schema.is_mutable or match[2] in _REFUSED:
        raise ValueError(f"operator {name!r} changes its arguments or touches files")
    if name not in ADMITTED:
        draws = " (it draws random numbers)" if torch.Tag.nondeterministic_seeded in target.tags else ""
        raise ValueError(f"operator {name!r} is not one that a Program may hold{draws}")
    return target


_REFUSED = ("from_file",)

# fx writes names into the Python source that it compiles: a name must never be able to end the string or the
# identifier that it stands in.
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_@:/ -]+(\.[A-Za-z0-9_@:/ -]+)*")


def _check_node(item: Mapping[str, Any]) -> None:
    op, name, target = item["op"], item["name"], item["target"]
    paths = [item["meta"].get(key, "x") for key in ("site", "scope")]
    if op not in ("placeholder", "get_attr", "call_function", "output"):
        raise ValueError(f"node {name!r} has op {op!r}")
    if not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name) or name == "self":
        raise ValueError(f"node {name!r} has a name that is not an identifier")
    if op == "placeholder" and (target != name or item["args"] or item["kwargs"]):
        raise ValueError(f"input {name!r} is called {target!r}; its name cannot be used")
    for path in (*paths, target) if op == "get_attr" else paths:
        if not _PATH.fullmatch(path) or any(map(keyword.iskeyword, path.split("."))):
            raise ValueError(f"the name {path!r} has a Python keyword or a character that hqc does not take")
    if not all(_IDENTIFIER.fullmatch(key) for key in item["kwargs"]):
        raise ValueError(f"node {name!r} has an argument whose name is not an identifier")
    if not isinstance(item["args"], list):
        raise ValueError(f"node {name!r} has no list of arguments")
    shape, role, dtype = (
        item["meta"].get(key, default) for key, default in (("shape", []), ("role", ""), ("dtype", ""))
    )
    if not isinstance(shape, (list, tuple)) or not all(type(d) in (int, str) for d in shape):
        raise ValueError(f"node {name!r} has a shape that is no list of sizes")
    if not isinstance(role, str) or not isinstance(dtype, str):
        raise ValueError(f"node {name!r} has a role or a dtype that is no text")


_META = ("site", "scope", "role", "shape", "dtype")


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """The graph as a list of plain nodes, in execution order."""
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _target_name(node.target) if node.op == "call_function" else str(node.target),
            "args": _encode(node.args),
            "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
            "meta": {key: node.meta[key] for key in _META if key in node.meta},
        }
        for node in graph.nodes
    ]


def graph_from_json(data: list[dict[str, Any]]) -> fx.Graph:
    """Builds the graph; only the operators of `hqc.operators` and arithmetic on sizes are admitted."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for item in data:
        _check_node(item)
        op, name = item["op"], item["name"]
        if name in nodes:
            raise ValueError(f"two nodes are called {name!r}")
        target = _find_target(item["target"]) if op == "call_function" else item["target"]
        args = tuple(_decode(item["args"], nodes))
        node = graph.create_node(op, target, args, {k: _decode(v, nodes) for k, v in item["kwargs"].items()}, name)
        if node.name != name:
            node.name = name
        node.meta = {k: tuple(v) if k == "shape" else v for k, v in item["meta"].items() if k in _META}
        nodes[name] = node
    if not data or data[-1]["op"] != "output" or [n["op"] for n in data].count("output") != 1:
        raise ValueError("the graph does not end in its one output")
    graph.lint()
    return graph
