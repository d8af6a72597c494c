"""The values of a sample set at one place of a graph, which moves through it once: what is still to be read there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from hqc.program import BATCH, Program
from hqc.running import node_failure
from hqc.sampling.sample_set import SampleSet

__all__ = ["Frontier"]


class Frontier:
    """Runs a program node by node on all samples, some at a time, and keeps what later nodes read.

    state: the tensors that are run with; it may change in front of the nodes that read them.
    """

    def __init__(self, program: Program, samples: SampleSet, state: Mapping[str, Tensor], rows: int) -> None:
        self._nodes = list(program.graph.nodes)
        self._places = {node.name: place for place, node in enumerate(self._nodes)}
        self._last = {node: max((self._places[u.name] for u in node.users), default=-1) for node in self._nodes}
        self._state, self._at = state, 0
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._inputs = set(inputs)
        self._chunks: list[dict[fx.Node, Any]] = [
            dict(zip(inputs, chunk, strict=True)) for chunk in samples.chunks(rows)
        ]

    def behind(self, name: str) -> None:
        """Runs every node up to this one, and this one."""
        self._run_to(self._places[name] + 1)

    def before(self, name: str) -> None:
        """Runs every node in front of this one."""
        self._run_to(self._places[name])

    def value(self, name: str) -> Tensor:
        """A node's value, of all samples: an input's, or one that later nodes read."""
        node = self._nodes[self._places[name]]
        values = [chunk[node] for chunk in self._chunks]
        batched = node.meta.get("shape", (BATCH,))[:1] == (BATCH,)
        return torch.cat(values) if batched else values[0]

    @torch.no_grad()
    def _run_to(self, end: int) -> None:
        run = self._nodes[self._at : end]
        for chunk in self._chunks:
            for node in run:
                if node.op == "call_function":
                    chunk[node] = self._computed(node, chunk)
                self._drop(node, chunk)
        self._at = max(self._at, end)

    def _computed(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        def value(read: fx.Node) -> Any:
            return self._state[str(read.target)] if read.op == "get_attr" else values[read]

        args: Any = fx.map_arg(node.args, value)
        kwargs: Any = fx.map_arg(node.kwargs, value)
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise node_failure(node, error) from error

    def _drop(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """What nobody reads behind a node."""
        place = self._places[node.name]
        for read in (node, *node.all_input_nodes):
            if self._last[read] <= place and read not in self._inputs and node.op != "output":
                values.pop(read, None)
