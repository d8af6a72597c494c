"""A program's graph walked without data: calls against their operators' schemas, noted shapes against what they give.

Nothing is computed: the values are torch's fake tensors, which have a shape, a dtype and strides and no memory. What
passes runs, but for what depends on values (an index out of range is refused by its operator).
"""

import ast
import logging
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from hqc.memory import require_memory
from hqc.operators import ADMITTED, RULES
from hqc.program import BATCH, Program

__all__ = ["check_calls", "size_of"]

_BATCH = 61  # below capture's bound, and no axis of a model is likely to have this size
_MOST_NODES = 200_000
_LARGEST = 2**63
_LONGEST_TEXT = 200


def check_calls(program: Program) -> None:
    """Checks every node of a graph: its operator, the arguments, the shape and the dtype that it notes.

    Requires: weights that exist, inputs as the graph has them.

    Raises:
        ValueError: naming the node and its operator. MemoryShortError: if a value, or what is alive at once, does not
            fit the memory that is free.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # which takes long to import

    nodes = list(program.graph.nodes)
    if len(nodes) > _MOST_NODES:
        raise ValueError(f"the graph has {len(nodes)} nodes; expected at most {_MOST_NODES}")
    _check_memory(program, nodes)
    inputs = {spec.name: spec for spec in program.inputs}
    values: dict[fx.Node, Any] = {}
    # Fallbacks would run an operator on real memory.
    with _quiet(), FakeTensorMode(allow_fallback_kernels=False), torch.no_grad():
        for node in nodes:
            if node.op == "placeholder":
                spec = inputs[node.name]
                if tuple(node.meta.get("shape", ())) != spec.shape:
                    raise ValueError(f"input {node.name!r} is {list(spec.shape)} and the graph says otherwise")
                shape = [size_of(d, _BATCH) for d in spec.shape]
                values[node] = torch.empty(shape, dtype=getattr(torch, spec.dtype))
            elif node.op == "get_attr":
                values[node] = _like(program.state[str(node.target)])
            elif node.op == "call_function":
                values[node] = _called(node, values)
            else:
                _check_output(node, values)
                continue
            if isinstance(values[node], Tensor):
                _check_notes(node, values[node])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own lines about what it refuses: the refusal says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def size_of(dimension: Any, batch: int) -> int:
    """A noted dimension in numbers: 4, N, or sums, products and quotients of both such as 4*N.

    >>> size_of("4*N", 3), size_of("N//2 + 1", 4), size_of(5, 1)
    (12, 3, 5)

    Raises:
        ValueError: for anything else, or a number that no axis has.
    """
    found = dimension
    if isinstance(dimension, str):
        if len(dimension) > _LONGEST_TEXT:
            raise ValueError("a dimension is a text of unusual length")
        try:
            found = _evaluated(ast.parse(dimension, mode="eval").body, batch)
        except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
            raise ValueError(f"{dimension!r} is no dimension") from error
    if type(found) is not int or not 0 <= found < _LARGEST:
        raise ValueError(f"{dimension!r} is no dimension")
    return found


_ON_SIZES: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _evaluated(tree: ast.expr, batch: int) -> int:
    match tree:
        case ast.Constant(value=int(number)) if type(number) is int:
            return number
        case ast.Name(id=name) if name == BATCH:
            return batch
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ON_SIZES:
            return _ON_SIZES[type(op)](_evaluated(left, batch), _evaluated(right, batch))
    raise ValueError("an expression that is no dimension")


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype)


def _check_memory(program: Program, nodes: Sequence[fx.Node]) -> None:
    """Whether one sample fits: the largest value, and what is alive at once."""
    alive: dict[fx.Node, int] = {}
    uses = {node: len(node.users) for node in nodes}
    most = total = 0
    for node in nodes:
        shape = node.meta.get("shape", ()) if node.op != "get_attr" else (0,)
        if node.op == "placeholder":
            shape = next((spec.shape for spec in program.inputs if spec.name == node.name), ())
        alive[node] = _item_bytes(node.meta.get("dtype")) * math.prod(size_of(d, 1) for d in shape)
        total += alive[node]
        most = max(most, total)
        for read in node.all_input_nodes:
            uses[read] -= 1
            total -= alive[read] if uses[read] == 0 else 0
    require_memory("one call of the program", most, "Take a larger machine")


def _item_bytes(dtype: Any) -> int:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    return found.itemsize if isinstance(found, torch.dtype) else 4


def _check_notes(node: fx.Node, value: Tensor) -> None:
    dtype, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
    if "shape" not in node.meta:
        raise ValueError(f"node {node.name!r} notes no shape; it gives {dtype} {shape}")
    noted = [size_of(d, _BATCH) for d in node.meta["shape"]]
    if noted != shape or node.meta.get("dtype") != dtype:
        raise ValueError(
            f"node {node.name!r} notes {node.meta.get('dtype')} {list(node.meta['shape'])}; it gives {dtype} "
            f"{shape} for a batch of {_BATCH}"
        )


def _check_output(node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
    given = node.args[0] if len(node.args) == 1 else None
    value = values.get(given) if isinstance(given, fx.Node) else None
    if not isinstance(value, Tensor) or value.ndim < 1 or not value.is_floating_point():
        raise ValueError("the graph does not give one tensor of real numbers")


# ---- one call --------------------------------------------------------------------------------------------------------


def _called(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args: Any = fx.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
    target: Any = node.target
    try:
        if isinstance(target, torch._ops.OpOverload):
            _check_call(node, target, args, kwargs)
        else:
            _check_numbers(node, args, kwargs)
        result = target(*args, **kwargs)
    except _Refused:
        raise
    except Exception as error:  # whatever an operator says to arguments that it does not take
        raise _Refused(f"{_named(node)} does not take its arguments ({_first_words(error)})") from error
    return _checked_result(node, result)


class _Refused(ValueError):
    """What is wrong, with the node's name already in it."""


def _named(node: fx.Node) -> str:
    return f"node {node.name!r} ({getattr(node.target, '__name__', node.target)})"


def _first_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _checked_result(node: fx.Node, result: Any) -> Any:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, (tuple, list)) and all(isinstance(part, Tensor) for part in result):
        return result
    if isinstance(result, float) or (isinstance(result, int) and abs(result) < _LARGEST):
        return result
    raise _Refused(f"{_named(node)} gives a {type(result).__name__}, or a number that does not fit 64 bits")


def _check_numbers(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Arithmetic on sizes takes numbers; `getitem` one of several tensors."""
    if kwargs:
        raise _Refused(f"{_named(node)} has arguments by name")
    if node.target is operator.getitem:
        if len(args) == 2 and isinstance(args[0], (tuple, list)) and type(args[1]) is int:
            return
        raise _Refused(f"{_named(node)} takes a list of tensors and a whole number")
    if not all(isinstance(value, (int, float)) for value in args):
        raise _Refused(f"{_named(node)} takes numbers")


def _check_call(node: fx.Node, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    name, schema = str(target), target._schema
    if name not in ADMITTED:
        raise _Refused(f"{_named(node)} is not an operator that a Program may hold")
    positional = [a for a in schema.arguments if not a.kwarg_only]
    if len(args) > len(positional):
        raise _Refused(f"{_named(node)} has {len(args)} arguments; expected at most {len(positional)}")
    given: dict[str, Any] = {a.name: value for a, value in zip(positional, args, strict=False)}
    known = {a.name: a for a in schema.arguments}
    for key, value in kwargs.items():
        if key not in known or key in given:
            raise _Refused(f"{_named(node)} has no argument {key!r}, or has it twice")
        given[key] = value
    for key, argument in known.items():
        if key in given:
            if problem := _type_problem(argument, given[key]):
                raise _Refused(f"{_named(node)} has {problem} as {key}; expected {argument.type}")
        elif argument.has_default_value():
            given[key] = argument.default_value
        else:
            raise _Refused(f"{_named(node)} lacks its argument {key}")
    if (
        problem := _size_problem(given)
        or _axis_problem(name, given)
        or (_unread(node) if name == _EMPTY else RULES.get(name, _nothing)(given))
    ):
        raise _Refused(f"{_named(node)} {problem}")


def _nothing(given: Mapping[str, Any]) -> str:
    return ""


_EMPTY = "aten.empty.memory_format"


def _unread(node: fx.Node) -> str:
    """Memory that nobody has written may only stand where a factor of 0 leaves it out."""
    left_out = all(
        str(user.target) == "aten.baddbmm.default"
        and user.args[:1] == (node,)
        and node not in user.args[1:]
        and user.kwargs.get("beta", 1) == 0
        for user in node.users
    )
    return "" if left_out else "gives memory that nothing has written"


_TEXTUAL: Mapping[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def _type_problem(argument: Any, value: Any) -> str:
    """What an argument is if it is not what the schema names, else nothing."""
    kind = str(argument.type)
    if kind.startswith("Optional["):
        if value is None:
            return ""
        kind = kind.removeprefix("Optional[").removesuffix("]")
    if argument.name in _TEXTUAL and kind == "int":
        return "" if isinstance(value, _TEXTUAL[argument.name]) else _shown(value)
    if kind.startswith("List[") and isinstance(value, (list, tuple)):
        inner = kind.removeprefix("List[").removesuffix("]")
        return next((_shown(part) for part in value if not _is_a(inner, part)), "")
    if kind.startswith("List["):  # one number for all axes
        fits = argument.N is not None and _is_a(kind.removeprefix("List[").removesuffix("]"), value)
        return "" if fits else _shown(value)
    return "" if _is_a(kind, value) else _shown(value)


def _is_a(kind: str, value: Any) -> bool:
    match kind:
        case "Tensor":  # arithmetic takes a number for a tensor; an operator that does not says so
            return isinstance(value, Tensor) or _is_number(value)
        case "Optional[Tensor]":
            return value is None or isinstance(value, Tensor)
        case "int":
            return type(value) is int and -_LARGEST <= value < _LARGEST
        case "bool":
            return type(value) is bool
        case "float":
            return _is_number(value) and type(value) is not bool
        case "number":
            return _is_number(value)
        case "str":
            return isinstance(value, str) and len(value) <= _LONGEST_TEXT
        case "Device":
            return isinstance(value, torch.device) and value.type == "cpu"
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and -_LARGEST <= value < _LARGEST)


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else f"{str(value)[:40]!r}"


_AXES = ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim")
_ONE_MORE = ("aten.unsqueeze.default", "aten.stack.default")


def _axis_problem(name: str, given: Mapping[str, Any]) -> str:
    """An axis that the first value does not have: some shape rules do not look at what they do not need."""
    first = next(iter(given.values()), None)
    x = first[0] if isinstance(first, (list, tuple)) and first else first
    if not isinstance(x, Tensor):
        return ""
    limit = max(1, x.ndim + (name in _ONE_MORE))
    for key in _AXES:
        value = given.get(key)
        for axis in value if isinstance(value, (list, tuple)) else [value]:
            if type(axis) is int and not -limit <= axis < limit:
                return f"has axis {axis}; its input has {x.ndim}"
    return ""


_AT_LEAST: Mapping[str, int] = {
    **dict.fromkeys(("stride", "dilation", "kernel_size", "groups", "num_groups", "repeats"), 1),
    **dict.fromkeys(("padding", "output_padding"), 0),
}
_LARGEST_GEOMETRY = 2**15


def _size_problem(given: Mapping[str, Any]) -> str:
    """Geometry that no operator takes; their shape rules do not always look."""
    for name, least in _AT_LEAST.items():
        value = given.get(name)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        for number in numbers:
            if type(number) is int and not least <= number < _LARGEST_GEOMETRY:
                return f"has a {name} of {number}; expected {least} to {_LARGEST_GEOMETRY - 1}"
    return ""
