"""Split the layers that read a concatenation: each part gets a quantiser of its own.

    before   y = op([x_0; x_1], W) + b                             one site
    after    y = (op(x_0, W[:, :c_0]) + b) + op(x_1, W[:, c_0:])   sites `site:0` and `site:1`

Exact but for the rounding of one sum: a convolution or linear layer is linear in its input channels, and zeros pad both
alike. A UNet's shortcut joins a deep feature with a skip connection whose range may be far larger: with one scale for
both, the smaller one loses its levels. Only layers that read the concatenation itself are split: behind a norm or an
activation there is one tensor. A rule or pattern that names `site` holds for its parts.
Source: Q-Diffusion (arXiv 2302.04304), split shortcut quantisation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from hqc.errors import PassError
from hqc.passes.parts import has_parts, replace_by_parts
from hqc.passes.rewriting import CONV, Rewriter, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage, aten, is_op

__all__ = ["SplitConcat"]

_CAT = aten.cat.default
NONE = ("concatenation", "no layer of the model reads one")


@dataclass(frozen=True)
class SplitConcat:
    """Makes every layer that reads a concatenation of its input channels one layer a part."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Layers that read a concatenation; misses are those that cannot be split, and what else reads one."""
        if program.plan.sites:
            raise PassError("split_concat", "the layers are selected already", "Run it before select_layers.")
        matches, misses = [], []
        for site, layer in program.sites():
            if not is_op(layer.args[0], _CAT):
                continue
            reason = _unfit(layer)
            misses.append((site, reason)) if reason else matches.append(site)
        misses += [miss for node in program.graph.nodes if is_op(node, _CAT) for miss in _whole(node)]
        if not matches and not misses and not has_parts(program):
            misses.append(NONE)
        return Findings(tuple(matches), tuple(misses))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Splits these sites."""
        if not matches:
            return program
        edit = rewrite(program)
        for site in matches:
            _split(edit, site)
        return edit.finish()


def _axis(layer: fx.Node) -> int:
    """The axis of a layer's input channels, counted from the front."""
    return 1 if is_op(layer, CONV) else len(layer.args[0].meta["shape"]) - 1  # type: ignore[union-attr]


def _parts(cat: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(cat.args[0])  # type: ignore[arg-type]


def _unfit(layer: fx.Node) -> str:
    """Why a layer that reads a concatenation is not split, or nothing."""
    cat: Any = layer.args[0]
    rank = len(cat.meta["shape"])
    axis = (cat.args[1] if len(cat.args) > 1 else 0) % rank
    if axis != _axis(layer):
        return f"reads a concatenation along axis {axis}, which is not its input channels"
    if is_op(layer, CONV) and len(layer.args) > 6 and layer.args[6] != 1:
        return f"reads a concatenation as a grouped convolution ({layer.args[6]} groups)"
    if not all(type(part.meta["shape"][axis]) is int for part in _parts(cat)):
        return "reads a concatenation whose parts have no fixed number of channels"
    return "reads a concatenation of one part" if len(_parts(cat)) < 2 else ""


def _whole(cat: fx.Node) -> Iterator[tuple[str, str]]:
    """What reads a concatenation as one tensor though a layer reads it too."""
    others = [user for user in cat.users if user.meta.get("role") != "layer"]
    if others and len(others) < len(cat.users):
        names = ", ".join(str(user.meta.get("scope", user.name)) for user in others[:3])
        yield cat.name, f"{names} reads it as one tensor: what follows there stays whole"


def _split(edit: Rewriter, site: str) -> None:
    layer = edit.layers[site]
    value, axis, start, parts = edit.program.state[str(layer_inputs(layer)[1].target)], _axis(layer), 0, []
    for x in _parts(layer.args[0]):  # type: ignore[arg-type]
        channels = x.meta["shape"][axis]
        parts.append((x, value.narrow(1, start, channels).clone()))
        start += channels
    replace_by_parts(edit, site, parts)
