"""What a denoiser computes from its sizes alone, places of patches at another size than its own, becomes a tensor.

Only where a grid is made (aten.meshgrid), which no target has an operator for; other graphs stay as they are.
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from hqc.program import Program, aten, copy_graph, is_op

__all__ = ["fold_grids"]

_GRIDS = (aten.meshgrid.indexing, aten.meshgrid.default)


def fold_grids(program: Program) -> Program:
    """The program with every value that depends on a grid and on no input or weight computed once."""
    if not any(is_op(node, *_GRIDS) for node in program.graph.nodes):
        return program
    graph, state = copy_graph(program.graph), dict(program.state)
    values = _values(graph)
    from_grid = _descendants(graph, values.keys())
    for node in list(graph.nodes):
        if node not in from_grid or not isinstance(values[node], Tensor) or all(user in values for user in node.users):
            continue
        name = f"grid_{sum(key.startswith('grid_') for key in state)}"
        state[name] = values[node].contiguous()
        with graph.inserting_before(node):
            constant = graph.create_node("get_attr", name, name=name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    graph.eliminate_dead_code()
    return program.evolve(graph=graph, state=state)


def _values(graph: fx.Graph) -> dict[fx.Node, Any]:
    """The nodes that depend on neither an input nor a weight, with what they give."""
    found: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "call_function" and all(source in found for source in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), found.__getitem__)
            found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return found


def _descendants(graph: fx.Graph, constants: Collection[fx.Node]) -> set[fx.Node]:
    """The constants that are grids, or made of one."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in constants and (is_op(node, *_GRIDS) or any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found
