"""Attach LoRA: a low-rank delta is added to the weight *before* its quantiser.

    before   Q_w(W; s_w)
    after    Q_w(W + B·A; s_w),  A [r, C·kh·kw] Kaiming, B [O, r] zero

For a convolution A is a kh×kw convolution to r channels and B a 1×1 convolution, merged as one product; with
`taps=True` both are of every tap (u, v), so that the delta has rank r there:

    Δ[o, c, u, v] = Σ_r B[o, r, u, v]·A[r, c, u, v],        A [T, r, C] Kaiming, B [T, O, r] zero, T = kh·kw

Because the
sum is quantised as a whole, inference has no float branch. B starts at zero, so nothing changes until training.
Source: EfficientDM (arXiv 2310.03270) QALoRA; HQ-DM; factors of taps MPQ-DM (arXiv 2412.11549).
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from hqc.errors import PlanError
from hqc.passes.rewriting import Rewriter, layer_inputs, rewrite, smaller_ranks
from hqc.pipeline import Findings
from hqc.program import Program, Stage, aten
from hqc.site_rules import deciding

__all__ = ["AttachLora", "lora_delta"]


@dataclass(frozen=True)
class AttachLora:
    """Adds a trainable delta of the given rank to the weight of every quantised site but the 8-bit edge layers.

    rank: at most min(O, C·kh·kw) is used, and the record says where; a plan's rules may give single sites another,
    which must be at most that.
    seed: of the initialisation of A; each site draws its own numbers. taps: both factors of a convolution are of every
    tap, the rank at most min(O, C) there.
    """

    rank: int = 32
    seed: int = 0
    taps: bool = False

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
        ranks = {site: self._rank(program, site, layers[site]) for site in matches}
        less = {site: rank for site, rank in ranks.items() if rank < self.rank and not _has_own(program, site)}
        return Findings(tuple(matches), (*misses, *smaller_ranks(self.rank, less, "have")))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts mm, view and add in front of each weight quantiser."""
        edit = rewrite(program)
        plans = {}
        for site in matches:
            quantiser = layer_inputs(edit.layers[site])[1]
            weight = quantiser.args[0]
            shape = program.state[str(weight.target)].shape  # type: ignore[union-attr]
            rank = self._rank(program, site, edit.layers[site])
            insert = _insert_taps if self._of_taps(shape) else _insert_product
            shaped = insert(edit, quantiser, site, list(shape), rank, self.seed)
            total = edit.call(quantiser, aten.add.Tensor, weight, shaped, like=weight, site=site, role="lora")  # type: ignore[arg-type]
            quantiser.replace_input_with(weight, total)  # type: ignore[arg-type]
            plans[site] = replace(program.plan[site], lora_rank=rank)
        return edit.finish(plan=program.plan.with_sites(plans))

    def _rank(self, program: Program, site: str, layer: fx.Node) -> int:
        """Of a site: what the plan's rules say, or this pass's own as far as the weight has it."""
        weight = layer_inputs(layer)[1].args[0]
        shape = program.state[str(weight.target)].shape  # type: ignore[union-attr]
        largest = min(shape[0], shape[1] if self._of_taps(shape) else math.prod(shape[1:]))
        rule = deciding(program.plan.rules, site, "lora_rank")
        if rule is None or rule.lora_rank is None:
            return min(self.rank, largest)
        if rule.lora_rank > largest:
            found = f"lora_rank {rule.lora_rank} exceeds the layer {site}, whose weight is {list(shape)}"
            raise PlanError(rule.place, found, f"Give at most {largest} there.")
        return rule.lora_rank

    def _of_taps(self, shape: Sequence[int]) -> bool:
        """Whether a weight of that shape has factors of taps: one of a single tap has the plain ones."""
        return self.taps and math.prod(shape[2:]) > 1


def _has_own(program: Program, site: str) -> bool:
    """Whether the plan's rules give a site its rank."""
    rule = deciding(program.plan.rules, site, "lora_rank")
    return rule is not None and rule.lora_rank is not None


def _insert_product(
    edit: Rewriter, quantiser: fx.Node, site: str, shape: Sequence[int], rank: int, seed: int
) -> fx.Node:
    """B·A in the shape of the weight."""
    columns = math.prod(shape[1:])
    down = edit.weight(f"{site}.lora_a", _kaiming(rank, columns, seed, site), quantiser)
    up = edit.weight(f"{site}.lora_b", torch.zeros(shape[0], rank), quantiser)
    delta = edit.call(quantiser, aten.mm.default, up, down, shape=(shape[0], columns), dtype="float32")
    return edit.call(quantiser, aten.view.default, delta, list(shape), shape=tuple(shape), dtype="float32")


def _insert_taps(edit: Rewriter, quantiser: fx.Node, site: str, shape: Sequence[int], rank: int, seed: int) -> fx.Node:
    """The products of all taps in the shape of the weight."""
    rows, columns, taps = shape[0], shape[1], math.prod(shape[2:])
    start = _kaiming(rank, columns * taps, seed, site).view(rank, columns, taps).permute(2, 0, 1).contiguous()
    down = edit.weight(f"{site}.lora_a", start, quantiser)
    up = edit.weight(f"{site}.lora_b", torch.zeros(taps, rows, rank), quantiser)
    sizes: Any = {"shape": (taps, rows, columns), "dtype": "float32"}
    product = edit.call(quantiser, aten.bmm.default, up, down, **sizes)
    sizes = {"shape": (rows, columns, taps), "dtype": "float32"}
    turned = edit.call(quantiser, aten.permute.default, product, [1, 2, 0], **sizes)
    sizes = {"shape": tuple(shape), "dtype": "float32"}
    return edit.call(quantiser, aten.reshape.default, turned, list(shape), **sizes)


def lora_delta(down: Tensor, up: Tensor, shape: Sequence[int]) -> Tensor:
    """What A and B add to a weight of that shape, by the operations of the graph."""
    if down.ndim == 2:
        return up.mm(down).view(list(shape))
    return torch.bmm(up, down).permute(1, 2, 0).reshape(list(shape))


def _kaiming(rank: int, columns: int, seed: int, site: str) -> Tensor:
    """A [r, K] uniform in ±1/√K (Kaiming with a = √5), drawn from a generator of the site's own."""
    # torch's CPU generator takes 32 bits of seed: both numbers go into one checksum.
    generator = torch.Generator().manual_seed(zlib.crc32(site.encode(), seed & 0xFFFF_FFFF))
    return (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
