"""Attach a branch: a low-rank float path beside the site takes over what few codes cannot hold.

    before   y = op(x̂, W) + b                     x̂: behind any smoothing
    after    y = (op(x̂, R) + b) + up(down(x̂))     down [r, C·kh·kw], up [O, r]

For a convolution `down` is one of the layer's own kernel, stride, padding and dilation to r channels, `up` a 1×1; for a
linear layer both are linear. `insert_qdq` quantises x̂ and R; the branch stays float and reads x̂ itself. R starts as W
and `up` at zero, so nothing changes; `decompose` fills all three. Source: SVDQuant (arXiv 2411.05007).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from hqc.errors import PlanError
from hqc.passes.rewriting import CONV, LINEAR, Rewriter, asked_sites, layer_inputs, rewrite, smaller_ranks
from hqc.pipeline import Findings
from hqc.plan import SitePlan
from hqc.program import Program, Stage, aten, is_op
from hqc.sites import branch_name, source_of

__all__ = ["AttachBranch"]


@dataclass(frozen=True)
class AttachBranch:
    """Adds a float branch of that rank to every quantised site but the 8-bit edge layers.

    rank: a quarter of min(O, C·kh·kw) at most is used, one at least, and the record says where; a larger one
    would cost what the layer does.
    """

    rank: int = 32

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PlanError(
                f"rank {self.rank}", "a branch needs a rank of at least 1", "Leave attach_branch out instead."
            )

    def find(self, program: Program) -> Findings:
        """Sites that are quantised at the asked bits."""
        found, layers = asked_sites(program, _unfit), dict(program.sites())
        ranks = {site: self._rank(_weight_of(program, layers[site])) for site in found.matches}
        less = {site: rank for site, rank in ranks.items() if rank < self.rank}
        return Findings(found.matches, (*found.misses, *smaller_ranks(self.rank, less, "have a quarter of")))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts both layers and the sum, and gives every site a weight of its own."""
        edit, plans = rewrite(program), {}
        for site in matches:
            layer = edit.layers[site]
            weight, value = layer_inputs(layer)[1], _weight_of(program, layer)
            layer.replace_input_with(weight, edit.weight(f"{site}.weight_residual", value, layer))
            rank = self._rank(value)
            _attach(edit, site, tuple(value.shape), rank)
            plans[site] = replace(program.plan[site], branch_rank=rank)
        return edit.finish(plan=program.plan.with_sites(plans))

    def _rank(self, weight: Tensor) -> int:
        return min(self.rank, max(1, min(len(weight), weight[0].numel()) // 4))


def _weight_of(program: Program, layer: fx.Node) -> Tensor:
    return program.state[str(layer_inputs(layer)[1].target)]


def _unfit(plan: SitePlan) -> str:
    return "has a branch already" if plan.branch_rank else ""


def _attach(edit: Rewriter, site: str, shape: tuple[int, ...], rank: int) -> None:
    layer = edit.layers[site]
    x, after = source_of(layer, through_smoothing=False), layer.next
    readers, image, outer = list(layer.users), is_op(layer, CONV), layer.meta["shape"]
    down = edit.weight(f"{site}.branch_down", torch.zeros(rank, *shape[1:]), after)
    up = edit.weight(f"{site}.branch_up", torch.zeros(shape[0], rank, *([1, 1] if image else [])), after)
    inner = (outer[0], rank, *outer[2:]) if image else (*outer[:-1], rank)
    # No site of its own: layers that have one are named by it in exports.
    scope = {"scope": layer.meta["scope"]} if "scope" in layer.meta else {}
    narrow = {**scope, "shape": inner, "dtype": layer.meta["dtype"]}
    geometry = layer.args[3:6] if image else ()
    target = CONV if image else LINEAR
    first = edit.call(after, target, x, down, None, *geometry, role="branch_down", **narrow)
    second = edit.call(after, target, first, up, None, like=layer, role="branch_up", **scope)
    total = edit.call(after, aten.add.Tensor, layer, second, like=layer, site=site, role="branch")
    total.name = branch_name(site)
    for reader in readers:
        reader.replace_input_with(layer, total)
