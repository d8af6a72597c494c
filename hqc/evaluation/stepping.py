"""Running a program node by node, so that its sites can be watched without keeping its activations."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hqc.bounds import QUANTISER_ROLES
from hqc.ops.hadamard import hadamard
from hqc.passes.rewriting import layer_inputs, rewrite
from hqc.program import Program, Stage
from hqc.running import node_failure

__all__ = ["Run", "float_program"]


class Run:
    """One call of a program's graph: values are dropped after their last reader."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.module = program.module()
        self.nodes = list(self.module.graph.nodes)
        self._last = _last_readers(self.nodes)

    def start(self, args: Sequence[Tensor]) -> dict[fx.Node, Any]:
        """The values of the inputs."""
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        return dict(zip(inputs, args, strict=True))

    @torch.no_grad()
    def steps(self, values: dict[fx.Node, Any], first: int = 0) -> Iterator[tuple[int, fx.Node]]:
        """Computes node after node from number `first` and yields each once its value is in `values`.

        What the reader puts into `values` instead is what later nodes read.

        Raises:
            EvaluationError: naming a node that cannot be computed.
        """
        for number in range(first, len(self.nodes)):
            node = self.nodes[number]
            if node.op == "output":
                values[node] = fx.map_arg(node.args[0], values.__getitem__)
            elif node.op == "get_attr":
                values[node] = self.program.state[str(node.target)]
            elif node.op == "call_function":
                values[node] = _computed(node, values)
            yield number, node
            for done in self._last.get(node, ()):
                values.pop(done, None)

    def finish(self, values: dict[fx.Node, Any], first: int = 0) -> Tensor:
        """Runs to the end; the output."""
        for _ in self.steps(values, first):
            pass
        return values[self.nodes[-1]]  # type: ignore[no-any-return]


def _computed(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args: Any = fx.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise node_failure(node, error) from error


def _last_readers(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """By node, the values that nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for read in (node, *node.all_input_nodes):
            last[read] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for read, node in last.items():
        if node.op != "output" and read.op != "placeholder":
            found.setdefault(node, []).append(read)
    return found


_ADDED = (*QUANTISER_ROLES, "rotation", "rotation_back", "lora")


def float_program(program: Program) -> Program:
    """The program without what quantisation added: rotations, quantisers and LoRA; its weights as captured.

    A weight that was rotated is rotated back, to float rounding.
    """
    if program.stage == Stage.CAPTURED and not any(plan.block for plan in program.plan.sites):
        return program
    edit = rewrite(program)
    for node in list(edit.graph.nodes):
        if node.meta.get("role") in _ADDED:
            node.replace_all_uses_with(node.args[0])
    for plan in program.plan.sites:
        if plan.weight_rotated and plan.hadamard:
            name = str(layer_inputs(edit.layers[plan.site])[1].target)
            edit.state[name] = hadamard(edit.state[name], plan.block, 1, plan.hadamard.regular)
    return edit.finish(stage=Stage.CAPTURED)
