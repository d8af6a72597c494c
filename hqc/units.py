"""The units of a denoiser: the blocks and the layers outside of them, each with its inputs and its one output.

A unit is the innermost `resnets.N`, `transformer_blocks.N`, `single_transformer_blocks.N` or `attentions.N` of the
module paths that capture keeps; a layer in none of them is a unit of its own, all parts of a split one together. Units
are named by nodes, which passes keep: one definition serves a program with and without its quantisers.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from hqc.program import BATCH, Program
from hqc.site_names import whole_site

__all__ = ["Unit", "unit_program", "units_of"]

_BLOCK = re.compile(r"(?:^|(?<=\.))(?:resnets|transformer_blocks|single_transformer_blocks|attentions)\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Unit:
    """A part of a graph: the nodes whose values it reads, the one whose value is read of it, its sites."""

    name: str
    inputs: tuple[str, ...]
    output: str
    sites: tuple[str, ...]


def units_of(program: Program) -> tuple[Unit, ...]:
    """The units of a captured program, in the order in which data meets them.

    A block of two outputs, as of two streams of tokens, is taken apart into its layers. A site that reads or gives
    values whose first axis is not the batch is in no unit.
    """
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    found = dict[str, Unit]()
    taken = set[str]()
    for name, members in _blocks(program).items():
        unit = _unit(name, members, order)
        if unit is not None:
            found[name] = unit
            taken.update(unit.sites)
    for name, members in _layers(program, taken).items():
        unit = _unit(name, members, order)
        if unit is not None:
            found[name] = unit
    first = {site: order[layer] for site, layer in program.sites()}
    return tuple(sorted(found.values(), key=lambda unit: first[unit.sites[0]]))


def _blocks(program: Program) -> dict[str, list[fx.Node]]:
    """The calls of every block that has no block inside."""
    found = dict[str, list[fx.Node]]()
    for node in program.graph.nodes:
        if node.op == "call_function" and (name := _block(node.meta.get("scope", ""))):
            found.setdefault(name, []).append(node)
    return {name: nodes for name, nodes in found.items() if not any(other.startswith(f"{name}.") for other in found)}


def _block(scope: str) -> str:
    """The innermost block of a path, or nothing."""
    ends = [match.end() for match in _BLOCK.finditer(scope)]
    return scope[: ends[-1]] if ends else ""


def _layers(program: Program, taken: Collection[str]) -> dict[str, list[fx.Node]]:
    """The layers of no block by their site, with the sums of their parts."""
    found = dict[str, list[fx.Node]]()
    left = {whole_site(site) for site, _ in program.sites() if site not in taken}
    for node in program.graph.nodes:
        if node.meta.get("role") in (None, "layer") and (name := whole_site(node.meta.get("site", ""))) in left:
            found.setdefault(name, []).append(node)
    return found


def _unit(name: str, members: Sequence[fx.Node], order: dict[fx.Node, int]) -> Unit | None:
    """The unit of these nodes, if it has layers, one output, and its inputs before its first layer."""
    inside = set(members)
    layers = [node for node in members if node.meta.get("role") == "layer"]
    outputs = [node for node in members if _is_value(node) and not inside.issuperset(node.users)]
    inputs = sorted({read for node in members for read in _read(node, inside)}, key=order.__getitem__)
    if not layers or not inputs or len(outputs) != 1 or order[inputs[-1]] > order[layers[0]]:
        return None
    if outputs[0].meta["shape"][:1] != (BATCH,) or not all(_by_sample(node) for node in inputs):
        return None
    sites = tuple(str(node.meta["site"]) for node in layers)
    return Unit(name, tuple(node.name for node in inputs), outputs[0].name, sites)


def _is_value(node: fx.Node) -> bool:
    """Whether it is a tensor; sizes are computed where they are needed."""
    return "shape" in node.meta and node.op != "get_attr"


def _by_sample(node: fx.Node) -> bool:
    """Whether its first axis is the batch, or it has none."""
    shape = node.meta["shape"]
    return shape[:1] == (BATCH,) or not any(isinstance(size, str) for size in shape)


def _read(node: fx.Node, inside: Collection[fx.Node]) -> Iterator[fx.Node]:
    """The tensors that a node reads from outside, those behind sizes too."""
    for read in node.all_input_nodes:
        if read in inside or read.op == "get_attr":
            continue
        if _is_value(read):
            yield read
        else:
            yield from _read(read, inside)


def unit_program(program: Program, unit: Unit, given: Collection[str] = ()) -> Program:
    """The part of a program that computes a unit's output; its placeholders are what it reads.

    program: any that has the unit's nodes. given: nodes within that are placeholders too, instead of being computed.
    What the program's passes have inserted may read more than the unit's inputs: the timestep, to look up scales.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    ends = {nodes[name] for name in (*unit.inputs, *given)}
    needed, waiting = set[fx.Node](), [nodes[unit.output]]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [] if node in ends else node.all_input_nodes
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (one for one in program.graph.nodes if one in needed):
        if node in ends or node.op == "placeholder":
            copies[node] = graph.placeholder(node.name)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].name = node.name
        copies[node].meta = dict(node.meta)
    graph.output(copies[nodes[unit.output]])
    state = {str(n.target): program.state[str(n.target)] for n in graph.nodes if n.op == "get_attr"}
    return program.evolve(graph=graph, state=state, inputs=())
