"""What the rewrites share: a copied graph with new weights, and the pieces of a quantised site."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from hqc.pipeline import Findings
from hqc.plan import SitePlan
from hqc.program import Program, aten, copy_graph, is_op
from hqc.wording import listed

__all__ = [
    "CONV",
    "LINEAR",
    "UNPLANNED",
    "Rewriter",
    "asked_sites",
    "channel_axis",
    "layer_inputs",
    "rewrite",
    "smaller_ranks",
]

CONV, LINEAR = aten.conv2d.default, aten.linear.default
UNPLANNED = "the plan does not name it: run select_layers first"


def channel_axis(layer: fx.Node) -> int:
    """The axis of a layer's channels: 1 for images [N, C, H, W], -1 for tokens […, C]."""
    return 1 if is_op(layer, CONV, torch.ops.hqc.int_conv2d.default) else -1


def layer_inputs(layer: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """(x, weight, bias) of a conv or linear node."""
    bias = layer.args[2] if len(layer.args) > 2 else None
    return layer.args[0], layer.args[1], bias  # type: ignore[return-value]


def asked_sites(program: Program, unfit: Callable[[SitePlan], str]) -> Findings:
    """The sites that are quantised at the asked bits; unfit: why a pass leaves one of them as it is, or nothing."""

    def reason(site: str) -> str:
        if site not in program.plan:
            return UNPLANNED
        plan = program.plan[site]
        if not plan.quantised:
            return f"float: {plan.reason}"
        edge = not plan.trained and (plan.weight_bits, plan.activation_bits) == (8, 8)
        return "8-bit edge layer: left as it is" if edge else unfit(plan)

    reasons = {site: reason(site) for site, _ in program.sites()}
    misses = tuple((site, why) for site, why in reasons.items() if why)
    return Findings(tuple(site for site, why in reasons.items() if not why), misses)


def smaller_ranks(asked: int, less: Mapping[str, int], have: str) -> tuple[tuple[str, str], ...]:
    """What a record says of layers whose ranks, `less`, are below the asked one; have: what of theirs counts."""
    if not less:
        return ()
    used = listed([f"{site} {rank}" for site, rank in less.items()])
    return ((f"rank {asked}", f"more than {len(less)} layers {have}, which get the most they can: {used}"),)


@dataclass
class Rewriter:
    """A private copy of a program's graph that one pass edits, with the tensors it adds."""

    program: Program
    graph: fx.Graph
    state: dict[str, Tensor]
    layers: dict[str, fx.Node] = field(default_factory=dict)

    def weight(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """Adds a weight to the state and a node that reads it, in front of `before`; reuses an existing reader."""
        self.state[name] = tensor
        for reader in self.graph.nodes:
            if reader is before:
                break
            if reader.op == "get_attr" and reader.target == name:
                return reader  # type: ignore[no-any-return]
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        node.meta = {"shape": tuple(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        return node

    def call(self, before: fx.Node, target: Any, *args: Any, like: fx.Node | None = None, **meta: Any) -> fx.Node:
        """Inserts a call in front of `before`; its shape is `like`'s unless `meta` says otherwise.

        A call of a site has the scope of the site's layer.
        """
        with self.graph.inserting_before(before):
            node = self.graph.create_node("call_function", target, args)
        shape: dict[str, Any] = {k: like.meta[k] for k in ("shape", "dtype") if like is not None and k in like.meta}
        layer = self.layers.get(meta.get("site", ""))
        scope = {"scope": layer.meta["scope"]} if layer is not None and "scope" in layer.meta else {}
        node.meta = {**shape, **scope, **meta}
        return node

    def finish(self, **changes: Any) -> Program:
        """The new program: dead nodes and unused weights dropped."""
        self.graph.eliminate_dead_code()
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        state = {name: tensor for name, tensor in self.state.items() if name in used}
        return self.program.evolve(graph=self.graph, state=state, **changes)


def rewrite(program: Program) -> Rewriter:
    """Starts a rewrite on a copy of the graph."""
    graph = copy_graph(program.graph)
    layers = {node.meta["site"]: node for node in graph.nodes if node.meta.get("role") == "layer"}
    return Rewriter(program, graph, dict(program.state), layers)
