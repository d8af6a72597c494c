"""What the fusions of the placed graph share: a match or a reason, and small rewrites of module calls."""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import fx, nn

from hqc.passes.rewriting import Rewriter
from hqc.program import is_op
from hqc.runtimes.integer.kernel_set import Kernels
from hqc.runtimes.integer.layers import Codes, IntegerLayer, KernelCall, Quantise

__all__ = ["Found", "Fusion", "Match", "Placed", "calls_of", "is_reshape", "name_of", "only_reader", "readers"]


@dataclass(frozen=True)
class Placed:
    """A graph with kernel calls, the modules that it calls, and the tensors that it reads."""

    edit: Rewriter
    modules: dict[str, nn.Module]

    def module(self, node: fx.Node | None) -> nn.Module | None:
        """What a node calls, if it calls a module."""
        return self.modules[str(node.target)] if node is not None and node.op == "call_module" else None

    def layer(self, node: fx.Node | None) -> IntegerLayer | None:
        """The product that a node calls, if it calls one."""
        module = self.module(node)
        return module if isinstance(module, IntegerLayer) else None

    def codes_of(self, node: fx.Node) -> Codes:
        """How a quantiser's node quantises."""
        module = self.module(node)
        assert isinstance(module, Quantise)
        return module.codes

    @property
    def kernels(self) -> Kernels:
        """Those that the graph's calls run."""
        return next(module.kernels for module in self.modules.values() if isinstance(module, KernelCall))

    def tensor(self, node: object) -> torch.Tensor | None:
        """A stored tensor in float32, or None for an argument that is left out."""
        if not isinstance(node, fx.Node):
            return None
        return self.edit.state[str(node.target)].detach().to(torch.float32)

    def is_stored(self, *nodes: object) -> bool:
        """Whether arguments are stored tensors or left out."""
        return all(node is None or (isinstance(node, fx.Node) and node.op == "get_attr") for node in nodes)

    def call(self, before: fx.Node, module: nn.Module, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
        """A call of a new module in front of a node, with `like`'s meta; keywords that are None are left out."""
        name = f"fused_{len(self.modules)}"
        self.modules[name] = module
        with self.edit.graph.inserting_before(before):
            node = self.edit.graph.call_module(name, args, {k: v for k, v in kwargs.items() if v is not None})
        node.meta = dict(like.meta)
        return node

    def item(self, node: fx.Node, index: int, **meta: Any) -> fx.Node:
        """One of the outputs of a call with several, right behind it."""
        with self.edit.graph.inserting_after(node):
            part = self.edit.graph.call_function(operator.getitem, (node, index))
        part.meta = {**({"site": node.meta["site"]} if "site" in node.meta else {}), **meta}
        return part

    def comes_before(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether one node stands in front of another."""
        return next(node for node in self.edit.graph.nodes if node in (first, second)) is first

    def erase(self, nodes: Iterable[fx.Node]) -> None:
        """Takes out those of the given nodes that nobody reads, in order, each once."""
        for node in dict.fromkeys(nodes):
            if not node.users:
                self.edit.graph.erase_node(node)


@dataclass(frozen=True)
class Match:
    """A place where a fusion applies: the site that it is named after and the nodes that it rewrites."""

    site: str
    nodes: tuple[Any, ...]


@dataclass(frozen=True)
class Found:
    """Where a fusion applies, and where it nearly does with the reason why not."""

    matches: list[Match] = field(default_factory=list)
    misses: list[tuple[str, str]] = field(default_factory=list)

    def miss(self, site: str, reason: str) -> None:
        """Notes a place that stays as it is."""
        self.misses.append((site, reason))


class Fusion(Protocol):
    """A rewrite of the placed graph: `find` reads it, `apply` changes one match."""

    name: ClassVar[str]

    def find(self, placed: Placed) -> Found:
        """Where it applies and where not."""
        ...

    def apply(self, placed: Placed, match: Match) -> None:
        """Rewrites one match of the graph that `find` has read."""
        ...


def calls_of(placed: Placed, *kinds: type[KernelCall]) -> Iterator[tuple[fx.Node, Any]]:
    """Module calls of the given kinds, in order."""
    for node in list(placed.edit.graph.nodes):
        module = placed.module(node)
        if isinstance(module, kinds):
            yield node, module


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads a node, in order."""
    return list(node.users)


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads another, None if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def name_of(node: fx.Node) -> str:
    """The site that a node belongs to, else its own name."""
    return str(node.meta.get("site") or node.name)


def is_reshape(node: fx.Node) -> bool:
    """Whether a node only names the axes of its input anew."""
    return is_op(node, torch.ops.aten.reshape.default, torch.ops.aten.view.default)
