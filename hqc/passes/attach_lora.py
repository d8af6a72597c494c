"""Attach LoRA: a low-rank delta is added to the weight *before* its quantiser.

    before   Q_w(W; s_w)
    after    Q_w(W + B·A; s_w),  A [r, C·kh·kw] Kaiming, B [O, r] zero

For a convolution A is a kh×kw convolution to r channels and B a 1×1 convolution, merged as one product. Because the
sum is quantised as a whole, inference has no float branch. B starts at zero, so nothing changes until training.
Source: EfficientDM (arXiv 2310.03270) QALoRA; HQ-DM.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from hqc.errors import PlanError
from hqc.passes.rewriting import layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage, aten
from hqc.site_rules import deciding

__all__ = ["AttachLora"]


@dataclass(frozen=True)
class AttachLora:
    """Adds a trainable delta of the given rank to the weight of every quantised site but the 8-bit edge layers.

    rank: at most min(O, C·kh·kw) is used; a plan's rules may give single sites another, which must be at most that.
    seed: of the initialisation of A; each site draws its own numbers.
    """

    rank: int = 32
    seed: int = 0

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PlanError(f"rank {self.rank}", "a LoRA needs a rank of at least 1", "Leave attach_lora out instead.")

    def find(self, program: Program) -> Findings:
        """Quantised sites that are trained.

        Raises:
            PlanError: for a rank of the plan's that exceeds a layer.
        """
        matches, misses, layers = [], [], dict(program.sites())
        for plan in program.plan.sites:
            if not plan.quantised:
                misses.append((plan.site, f"float: {plan.reason}"))
            elif not plan.trained:
                misses.append((plan.site, "8-bit edge layer: not trained"))
            elif plan.grouped:
                misses.append((plan.site, "scales of groups are not trained"))
            elif plan.lora_rank:
                misses.append((plan.site, "has a LoRA already"))
            elif not self._rank(program, plan.site, layers[plan.site]):
                misses.append((plan.site, "rank 0 asked for in the plan"))
            else:
                matches.append(plan.site)
        return Findings(tuple(matches), tuple(misses))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts mm, view and add in front of each weight quantiser."""
        edit = rewrite(program)
        plans = {}
        for site in matches:
            quantiser = layer_inputs(edit.layers[site])[1]
            weight = quantiser.args[0]
            shape = program.state[str(weight.target)].shape  # type: ignore[union-attr]
            columns, rank = math.prod(shape[1:]), self._rank(program, site, edit.layers[site])
            down = edit.weight(f"{site}.lora_a", _kaiming(rank, columns, self.seed, site), quantiser)
            up = edit.weight(f"{site}.lora_b", torch.zeros(shape[0], rank), quantiser)
            delta = edit.call(quantiser, aten.mm.default, up, down, shape=(shape[0], columns), dtype="float32")
            shaped = edit.call(quantiser, aten.view.default, delta, list(shape), like=weight)  # type: ignore[arg-type]
            total = edit.call(quantiser, aten.add.Tensor, weight, shaped, like=weight, site=site, role="lora")  # type: ignore[arg-type]
            quantiser.replace_input_with(weight, total)  # type: ignore[arg-type]
            plans[site] = replace(program.plan[site], lora_rank=rank)
        return edit.finish(plan=program.plan.with_sites(plans))

    def _rank(self, program: Program, site: str, layer: fx.Node) -> int:
        """Of a site: what the plan's rules say, or this pass's own as far as the weight has it."""
        weight = layer_inputs(layer)[1].args[0]
        shape = program.state[str(weight.target)].shape  # type: ignore[union-attr]
        largest = min(shape[0], math.prod(shape[1:]))
        rule = deciding(program.plan.rules, site, "lora_rank")
        if rule is None or rule.lora_rank is None:
            return min(self.rank, largest)
        if rule.lora_rank > largest:
            found = f"lora_rank {rule.lora_rank} exceeds the layer {site}, whose weight is {list(shape)}"
            raise PlanError(rule.place, found, f"Give at most {largest} there.")
        return rule.lora_rank


def _kaiming(rank: int, columns: int, seed: int, site: str) -> Tensor:
    """A [r, K] uniform in ±1/√K (Kaiming with a = √5), drawn from a generator of the site's own."""
    # torch's CPU generator takes 32 bits of seed: both numbers go into one checksum.
    generator = torch.Generator().manual_seed(zlib.crc32(site.encode(), seed & 0xFFFF_FFFF))
    return (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
