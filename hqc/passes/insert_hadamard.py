"""Insert Hadamard nodes: x becomes Ĥ·(Ĥ·x) in front of every selected layer.

    before   y = op(x, W)
    after    y = op(Ĥ·(Ĥ·x), W),  Ĥ = H_b/√b on channels, block by block

Ĥ is its own inverse, so nothing changes until `insert_qdq` puts a quantiser between the two rotations: that is
HQ-DM's single Hadamard transformation, in which the weight keeps its own grid. The block is the largest power of two
≤ `block` that divides the input channels, at least 8; without one the site stays unrotated and the plan says so.
Sites that read the same tensor share the first rotation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from hqc.errors import PlanError
from hqc.ops import block_size
from hqc.passes.rewriting import UNPLANNED, channel_axis, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage

__all__ = ["InsertHadamard"]

HADAMARD = torch.ops.hqc.hadamard.default


@dataclass(frozen=True)
class InsertHadamard:
    """Rotates the input of every quantised site there and back.

    block: order of the Hadamard matrix, a power of two in 8…128. tokens: rotate three-dimensional inputs (attention
    and feed-forward linears) too; False reproduces the reference implementation, which leaves them unrotated.
    """

    block: int = 32
    tokens: bool = True

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def __post_init__(self) -> None:
        if self.block not in (8, 16, 32, 64, 128):
            raise PlanError(f"block {self.block!r}", "expected 8, 16, 32, 64 or 128", "Use 32, the method's own.")

    def find(self, program: Program) -> Findings:
        """Quantised sites with a block that fits."""
        matches, misses = [], []
        for site, _ in program.sites():
            reason = self._miss(program, site)
            misses.append((site, reason)) if reason else matches.append(site)
        return Findings(tuple(matches), tuple(misses))

    def _miss(self, program: Program, site: str) -> str:
        if site not in program.plan:
            return UNPLANNED
        plan = program.plan[site]
        if plan.block:
            return f"rotated already, block {plan.block}"
        if not plan.quantised:
            return f"float: {plan.reason}"
        if plan.reason.startswith("unrotated"):
            return plan.reason
        layer = next(node for name, node in program.sites() if name == site)
        if not self.tokens and len(layer_inputs(layer)[0].meta["shape"]) == 3:
            return "three-dimensional input: left unrotated as in the reference implementation"
        if not block_size(plan.in_channels, self.block):
            return f"{plan.in_channels} input channels: no power of two from 8 to {self.block} divides them"
        return ""

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts both rotations and writes the block into the plan."""
        edit = rewrite(program)
        rotated: dict[tuple[fx.Node, int], fx.Node] = {}
        plans = {}
        for site in matches:
            layer = edit.layers[site]
            x, block, axis = (
                layer_inputs(layer)[0],
                block_size(program.plan[site].in_channels, self.block),
                channel_axis(layer),
            )
            if (x, block) not in rotated:
                rotated[x, block] = edit.call(layer, HADAMARD, x, block, axis, like=x, role="rotation")
            first = rotated[x, block]
            back = edit.call(layer, HADAMARD, first, block, axis, like=x, site=site, role="rotation_back")
            layer.replace_input_with(x, back)
            plans[site] = replace(program.plan[site], block=block)
        misses = dict(self.find(program).misses)
        for plan in program.plan.sites:
            if plan.quantised and not plan.block and plan.site in misses:
                plans[plan.site] = replace(plan, reason=f"unrotated: {misses[plan.site].removeprefix('unrotated: ')}")
        return edit.finish(plan=program.plan.with_sites(plans))
