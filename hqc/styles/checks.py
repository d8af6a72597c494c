"""What must hold of LoRAs that are attached to a program: their inputs, and the float branches beside sites."""

from collections.abc import Iterator
from typing import Any

from torch import fx

from hqc.program import BATCH, Program
from hqc.sites import source_of
from hqc.styles.record import scale_input

__all__ = ["style_problems"]


def style_problems(program: Program) -> list[str]:
    """What is wrong, a few of each kind."""
    wanted = set(map(scale_input, program.attached_styles))
    specs = {spec.name: spec for spec in program.inputs if spec.name in wanted}
    if len(specs) < len(program.attached_styles):
        return ["a LoRA is attached that has no input, or two have one"]
    if wrong := [name for name, spec in specs.items() if spec.shape != (BATCH,) or spec.default is None]:
        return [f"input {wrong[0]} is no scale of a LoRA"]
    layers, found = dict(program.sites()), list[str]()
    for node in program.graph.nodes:
        if node.meta.get("role") == "style":
            found += _branch_problems(node, layers, wanted)
    return found[:3]


def _branch_problems(total: fx.Node, layers: dict[str, fx.Node], inputs: set[str]) -> Iterator[str]:
    """total: the sum of a site and its branch."""
    site, layer = str(total.meta["site"]), layers.get(str(total.meta["site"]))
    up: Any = total.args[1]
    if layer is None:
        yield f"a LoRA is attached to {site}, which the graph lacks"
    elif not _is(up, "style_up") or not _is(up.args[0], "style_scaled") or not _is(up.args[0].args[0], "style_down"):
        yield f"site {site}: its LoRA is not two layers with a scale between them"
    elif up.args[0].args[0].args[0] is not source_of(layer):
        yield f"site {site}: its LoRA reads something else than it does"
    elif not _is(scale := up.args[0].args[1], "style_scale") or str(scale.args[0]) not in inputs:
        yield f"site {site}: its LoRA's scale is none of the inputs"


def _is(node: Any, role: str) -> bool:
    return isinstance(node, fx.Node) and node.meta.get("role") == role
