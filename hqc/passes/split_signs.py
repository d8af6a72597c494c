"""Split the layers behind SiLU or GELU: what is above zero and what is below get a quantiser each.

    before   y = op(x, W) + b,  x = silu(·) or gelu(·)              one site
    after    y = (op(max(x, 0), W) + b) + op(min(x, 0), W)          sites `site:0` and `site:1`

Exact but for the rounding of one sum. SiLU ends at -0.28 and GELU at -0.17, while values above zero have no bound: with
one scale what is below zero is code 0 or -1, though half of the values are there. Both products are integer ones, so
that the export has no floating point that the site had not; the price is a second product and a second copy of the
weight. A rotation mixes the signs again: leave these sites unrotated (`choose_rotation` measures it).
Source: SegQuant (arXiv 2507.14811), dual-scale quantisation, there a kernel of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from hqc.errors import PassError
from hqc.passes.parts import has_parts, replace_by_parts
from hqc.passes.rewriting import Rewriter, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage, aten, is_op
from hqc.site_names import whole_site

__all__ = ["SplitSigns"]

NONE = ("SiLU, GELU", "no layer of the model reads the result of one")
_ONE_SIDED = (aten.silu.default, aten.silu_.default, aten.gelu.default)


@dataclass(frozen=True)
class SplitSigns:
    """Makes every layer that reads SiLU's or GELU's result one layer a sign."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Layers right behind such a function; misses are those that are parts already."""
        if program.plan.sites:
            raise PassError("split_signs", "the layers are selected already", "Run it before select_layers.")
        behind = [site for site, layer in program.sites() if is_op(layer.args[0], *_ONE_SIDED)]
        parts = [site for site in behind if whole_site(site) != site]
        misses = [(site, "is a part of a split layer already") for site in parts]
        if not behind and not has_parts(program):
            misses.append(NONE)
        return Findings(tuple(site for site in behind if site not in parts), tuple(misses))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Splits these sites."""
        if not matches:
            return program
        edit = rewrite(program)
        signs: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for site in matches:
            x, weight, _ = layer_inputs(edit.layers[site])
            value = edit.program.state[str(weight.target)]
            if x not in signs:
                signs[x] = _signs(edit, x)
            replace_by_parts(edit, site, [(part, value.clone()) for part in signs[x]])
        return edit.finish()


def _signs(edit: Rewriter, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What is above zero, and what is below."""
    return (
        edit.call(x.next, aten.clamp.default, x, 0.0, like=x),
        edit.call(x.next, aten.clamp.default, x, None, 0.0, like=x),
    )
