"""What does not depend on the image runs beside the first convolutions, on a second stream.

The timestep's embedding, the projections of all blocks and cross-attention to one token are tens of kernels of a few
microseconds that cannot fill a GPU. In the graph they come first, in two groups: what hangs on the timestep alone, then
the rest. The image's own nodes follow on the main stream and wait for a group where they first read of it.

    before   s t₁ x₁ c₁ x₂(t) x₃(c)              one stream; s: the scales
    after    s fork t₁ done₁ c₁ done₂ back       t and c on the side
               x₁ wait₁ x₂(t) wait₂ x₃(c)        on the main stream

All allocations of the side stream come before the main stream's, so that none of its memory is given out again while
somebody may still read it.
"""

from typing import Any

import torch
from torch import fx, nn

from hqc.program import aten, is_op

__all__ = ["SideStream", "add_side_stream"]

_FEWEST = 4
"""Kernels that are worth a stream of their own."""
_VIEWS = (aten.select.int, aten.slice.Tensor, aten.unsqueeze.default, aten.sym_size.int)


class SideStream:
    """A stream beside the current one, with an event for each group; nothing of it happens without a CUDA device."""

    def __init__(self, device: torch.device, groups: int) -> None:
        self.side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.events: list[Any] = [torch.cuda.Event() for _ in range(groups)]  # type: ignore[no-untyped-call]
        self.main: Any = None


class _Fork(nn.Module):
    """From now on work goes to the side stream, after all that is queued on the main one."""

    def __init__(self, stream: SideStream | None) -> None:
        super().__init__()
        self.stream = stream

    def forward(self) -> None:
        """Returns nothing."""
        if self.stream is not None:
            self.stream.main = torch.cuda.current_stream()
            self.stream.side.wait_stream(self.stream.main)
            torch.cuda.set_stream(self.stream.side)


class _Done(_Fork):
    """A group is queued."""

    def __init__(self, stream: SideStream | None, group: int) -> None:
        super().__init__(stream)
        self.group = group

    def forward(self) -> None:
        """Returns nothing."""
        if self.stream is not None:
            self.stream.events[self.group].record(self.stream.side)


class _Back(_Fork):
    """Work goes to the main stream again."""

    def forward(self) -> None:
        """Returns nothing."""
        if self.stream is not None:
            torch.cuda.set_stream(self.stream.main)


class _Wait(_Done):
    """The main stream goes on when a group is done."""

    def forward(self) -> None:
        """Returns nothing."""
        if self.stream is not None:
            self.stream.events[self.group].wait(self.stream.main)


def add_side_stream(graph: fx.Graph, modules: dict[str, nn.Module], image: str, device: torch.device) -> int:
    """Orders a graph's nodes as above, in place; the kernels that run on the side, 0 where too few would.

    image: the input whose dependants are the main stream's.  On another device than a CUDA one the order is the same
    and the modules do nothing.
    """
    main, late = _dependants(graph, image)
    first = next((n for n in graph.nodes if n.op == "call_module" and n in main), None)
    if first is None:
        return 0
    early = _needed_by(first, main) | {node for node in graph.nodes if _is_size(node)}
    aside = [n for n in graph.nodes if n.op in ("call_function", "call_module") and n not in main and n not in early]
    groups = [g for g in ([n for n in aside if n not in late], [n for n in aside if n in late]) if g]
    count = len([n for n in aside if n.op == "call_module"])
    if count < _FEWEST:
        return 0
    stream = SideStream(device, len(groups)) if device.type == "cuda" else None
    call = _Calls(graph, modules)
    inputs = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    order = [*inputs, *(n for n in graph.nodes if n in early and n not in inputs), call("side_fork", _Fork(stream))]
    for index, group in enumerate(groups):
        order += [*group, call(f"side_done_{index}", _Done(stream, index))]
    order.append(call("side_back", _Back(stream)))
    waiting = dict(enumerate(map(set, groups)))
    for node in [n for n in graph.nodes if n in main and n not in inputs]:
        # The output waits at the latest: a capture ends with everything joined.
        for index in [i for i, group in waiting.items() if node.op == "output" or group & set(node.all_input_nodes)]:
            order.append(call(f"side_wait_{index}", _Wait(stream, index)))
            del waiting[index]
        order.append(node)
    output = order[-1]
    for node in order[:-1]:
        output.prepend(node)
    return count


class _Calls:
    """Adds modules and calls of them, at the end of the graph; they are put in order afterwards."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self._graph, self._modules = graph, modules
        self._last = next(iter(reversed(graph.nodes)))

    def __call__(self, name: str, module: nn.Module) -> fx.Node:
        self._modules[name] = module
        with self._graph.inserting_before(self._last):
            return self._graph.call_module(name)


def _dependants(graph: fx.Graph, image: str) -> tuple[set[fx.Node], set[fx.Node]]:
    """(what depends on the image, what depends on another input than image and timestep)."""
    main: set[fx.Node] = set()
    late: set[fx.Node] = set()
    for node in graph.nodes:
        given, inputs = node.op == "placeholder", node.all_input_nodes
        if _is_size(node):
            continue
        if (given and node.target == image) or any(i in main for i in inputs):
            main.add(node)
        elif (given and node.target != "timestep") or any(i in late for i in inputs):
            late.add(node)
    return main, late


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a size of an input, which is known before anything runs."""
    return is_op(node, aten.sym_size.int) and all(i.op == "placeholder" for i in node.all_input_nodes)


def _needed_by(first: fx.Node, main: set[fx.Node]) -> set[fx.Node]:
    """What the first kernel on the main stream waits for anyway, and views of that: scales are views of one look-up."""
    needed: set[fx.Node] = set()
    waiting = [node for node in first.all_input_nodes if node not in main]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    grown = True
    while grown:
        views = {
            user
            for node in needed
            for user in node.users
            if is_op(user, *_VIEWS) and user not in needed and all(i in needed for i in user.all_input_nodes)
        }
        needed |= views
        grown = bool(views)
    return needed
