"""Merge LoRA: W + B·A becomes the weight.

    before   Q_w(W + B·A; s_w)
    after    Q_w(W'; s_w),  W' = W + B·A computed once

The delta is added with the operations that the graph used, so no value changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from hqc.passes.attach_lora import lora_delta
from hqc.passes.rewriting import layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage

__all__ = ["MergeLora"]


@dataclass(frozen=True)
class MergeLora:
    """Folds every LoRA into its weight."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED, Stage.TRAINED)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Sites that have a LoRA."""
        misses = tuple((p.site, "has no LoRA") for p in program.plan.sites if not p.lora_rank)
        return Findings(tuple(p.site for p in program.plan.sites if p.lora_rank), misses)

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Computes the sum and drops the branch; a weight that several sites share becomes one for each."""
        edit = rewrite(program)
        plans = {}
        for site in matches:
            quantiser = layer_inputs(edit.layers[site])[1]
            total = quantiser.args[0]
            value = program.state[str(total.args[0].target)]  # type: ignore[union-attr]
            down, up = (program.state[f"{site}.lora_{name}"] for name in "ab")
            merged = edit.weight(f"{site}.weight_merged", value + lora_delta(down, up, value.shape), quantiser)
            quantiser.replace_input_with(total, merged)  # type: ignore[arg-type]
            plans[site] = replace(program.plan[site], lora_rank=0)
        return edit.finish(plan=program.plan.with_sites(plans))
