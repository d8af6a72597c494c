"""Attention in the graph of a program: as one operator, or written out, where its parts may have quantisers.

    one operator   scaled_dot_product_attention(q, k, v, mask, scale=f)
    written out    Q(softmax(Q(q·f) @ Q(k)ᵀ + mask)) @ Q(v)                 every Q may be missing

The last product of what is written out has the role `attention`; what stands before it is found from there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hqc.bounds import FAKE_QUANTISERS, QUANTISERS
from hqc.program import Program, aten, is_op

__all__ = [
    "ATTENTION",
    "PARTS",
    "WrittenOut",
    "argument_problem",
    "attention_arguments",
    "attentions",
    "attentions_by_fit",
    "part_name",
    "softmax_kinds",
    "written_out",
    "written_out_from",
]

ATTENTION = aten.scaled_dot_product_attention.default
PARTS = ("query", "key", "value", "softmax")
"""What may have a quantiser, in the order in which data meets them."""
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_PLAIN = {
    "attn_mask": (None, "it has a mask"),
    "dropout_p": (0.0, "it drops out at random"),
    "is_causal": (False, "it is causal"),
    "enable_gqa": (False, "its heads share keys"),
}
ops = torch.ops.hqc


def part_name(attention: str, part: str) -> str:
    """What the tensors of a part's quantiser are called by.

    >>> part_name("mid.attn1", "softmax")
    'mid.attn1.attention_softmax'
    """
    return f"{attention}.attention_{part}"


def attentions_by_fit(program: Program, unfit: Callable[[fx.Node], str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The names of those that fit, and of the others with what `unfit` says of them."""
    reasons = [(name, unfit(node)) for name, node in attentions(program.graph)]
    return [name for name, reason in reasons if not reason], [one for one in reasons if one[1]]


def attentions(graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """Every attention that is one operator, by a name of its own: the module of its value's layer, or the node's."""
    seen: set[str] = set()
    for node in graph.nodes:
        if is_op(node, ATTENTION):
            module = _module(node.args[2])
            name = module if module and module not in seen else node.name
            seen.add(name)
            yield name, node


def _module(value: Any) -> str:
    while value.op == "call_function" and value.meta.get("role") != "layer" and value.args:
        if not isinstance(value.args[0], fx.Node):
            return ""
        value = value.args[0]
    return str(value.meta.get("site", "")).rpartition(".")[0]


def attention_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an attention that is one operator, by name."""
    return {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}


def argument_problem(node: fx.Node, *, masked: bool = False) -> str:
    """Why its arguments are more than q, k, v, a scale and where `masked` a mask of numbers; or nothing."""
    for name, found in attention_arguments(node).items():
        if name in ("query", "key", "value", "scale"):
            continue
        if masked and name == "attn_mask" and isinstance(found, fx.Node):
            if found.meta.get("dtype") == "bool":
                return "its mask is of yes and no"
            continue
        if name not in _PLAIN:
            return f"argument {name} is not known"
        default, reason = _PLAIN[name]
        if found != default:
            return reason
    return ""


@dataclass(frozen=True)
class WrittenOut:
    """One attention that is written out: its parts as they are before their quantisers, and those by part.

    scaled: q·f, or q itself where f is 1. quantisers: the nodes that hold quantised reals: fake quantisers, or
    dequantised codes.
    """

    name: str
    result: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    factor: float
    scaled: fx.Node
    softmax: fx.Node
    quantisers: Mapping[str, fx.Node]

    @property
    def scores(self) -> fx.Node:
        """The product of queries and keys, in front of any mask."""
        found: Any = self.softmax.args[0]
        return found if self.mask is None else found.args[0]  # type: ignore[no-any-return]

    @property
    def products(self) -> tuple[tuple[fx.Node, str, str], ...]:
        """Both products, each with the parts that it reads."""
        return (self.scores, "query", "key"), (self.result, "softmax", "value")


def written_out(program: Program) -> Iterator[WrittenOut]:
    """Every attention that is written out, in graph order."""
    for node in program.graph.nodes:
        if node.meta.get("role") == "attention" and (found := written_out_from(node)) is not None:
            yield found


def written_out_from(result: Any) -> WrittenOut | None:
    """The attention that ends in this product; None if it is none that `open_attention` writes."""
    quantisers: dict[str, fx.Node] = {}

    def before(part: str, node: Any) -> Any:
        if is_op(node, ops.dequantize.default) and is_op(node.args[0], *QUANTISERS):
            quantisers[part] = node
            return node.args[0].args[0]
        wanted = (ops.softmax_quantize.default,) if part == "softmax" else FAKE_QUANTISERS
        if not is_op(node, *wanted):
            return node
        quantisers[part] = node
        return node.args[0]

    if not is_op(result, aten.matmul.default):
        return None
    softmax, value = before("softmax", result.args[0]), before("value", result.args[1])
    if not is_op(softmax, aten.softmax.int) or softmax.args[1:] != (-1,):
        return None
    scores, mask = softmax.args[0], None
    if is_op(scores, aten.add.Tensor):
        scores, mask = scores.args[:2]
    if not is_op(scores, aten.matmul.default) or not is_op(scores.args[1], aten.transpose.int):
        return None
    if scores.args[1].args[1:] != (-2, -1):
        return None
    key, scaled = before("key", scores.args[1].args[0]), before("query", scores.args[0])
    query, factor = scaled, 1.0
    if is_op(scaled, aten.mul.Scalar):
        query, factor = scaled.args[0], float(scaled.args[1])
    if not all(isinstance(node, fx.Node) for node in (query, key, value, scaled, *((mask,) if mask else ()))):
        return None
    name = str(result.meta.get("site", ""))
    ordered = {part: quantisers[part] for part in PARTS if part in quantisers}
    return WrittenOut(name, result, query, key, value, mask, factor, scaled, softmax, ordered)


def softmax_kinds(program: Program, quantiser: fx.Node) -> tuple[bool, bool]:
    """Whether some rows of a softmax's quantiser have even steps, and whether some have powers of two."""
    log2 = quantiser.args[2]
    table = log2.args[0] if is_op(log2, aten.index_select.default) else log2  # type: ignore[union-attr]
    if table.op != "get_attr":  # type: ignore[union-attr]
        return True, True
    kinds: Tensor = program.state[str(table.target)] > 0.5  # type: ignore[union-attr]
    return not bool(kinds.all()), bool(kinds.any())
