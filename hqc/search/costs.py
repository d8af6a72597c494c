"""What every site takes at every candidate width, in bits of its tensors or in bit operations.

    bits   of the site's codes at their width, and of its scales, zeros, tables and bias as they are
    files  the same as `hqc export --target onnxruntime` stores it: codes that fit four bits take four, others eight
    BOPs   multiply-adds · weight bits · activation bits, of one sample in one call; 32 · 32 where a site stays float

Both are whole numbers, so that plans can be held against a budget exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from hqc.errors import PlanError
from hqc.passes.rewriting import layer_inputs
from hqc.plan import SitePlan
from hqc.program import BATCH, Program
from hqc.search.budget import Budget, Count, Unit, shown

__all__ = ["CostTable", "cost_table", "limit_of"]

_FLOAT_BITS = 32
_PER_UNIT: Mapping[Unit, int] = {"bytes": 8, "BOPs": 1}


@dataclass(frozen=True)
class CostTable:
    """By site what each candidate takes; fixed: what all else takes. Bytes are counted in bits.

    bases: what all else takes where the plan's own bits are those of each candidate; `fixed` is the first's unless `on`
    says another's. A recipe may give sites that the rules fix a branch, or smoothing, where both have the same bits.
    """

    unit: Unit
    candidates: tuple[str, ...]
    sites: Mapping[str, tuple[int, ...]]
    fixed: int
    bases: tuple[int, ...] = ()

    def on(self, candidate: int) -> "CostTable":
        """For plans whose own bits are those of a candidate."""
        return replace(self, fixed=self.bases[candidate]) if self.bases else self

    def uniform(self, candidate: int) -> int:
        """Of equal bits everywhere."""
        return self.on(candidate).total([candidate] * len(self.sites))

    def total(self, chosen: Sequence[int]) -> int:
        """Of a plan: the number of the candidate of every site."""
        return self.fixed + sum(costs[one] for costs, one in zip(self.sites.values(), chosen, strict=True))

    @property
    def ends(self) -> tuple[int, int]:
        """Of the smallest and of the largest plan."""
        bases = self.bases or (self.fixed,)
        return (
            min(bases) + sum(min(costs) for costs in self.sites.values()),
            max(bases) + sum(max(costs) for costs in self.sites.values()),
        )

    def amount(self, cost: int) -> float:
        """In bytes or bit operations."""
        return cost / _PER_UNIT[self.unit]

    def text(self, cost: int) -> str:
        """For people."""
        return shown(self.amount(cost), self.unit)


def cost_table(planned: Mapping[str, Program], unit: Unit, count: Count = "bits") -> CostTable:
    """From a program at every candidate width: free are the sites that have the width in each.

    count: whether bytes are those of codes at their bits, or of files.

    Raises:
        PlanError: if no site is free.
    """
    programs = list(planned.values())
    free = [site.site for site in programs[0].plan.sites if _is_free(site.site, planned)]
    if not free:
        raise PlanError("search", "the recipe's rules leave no site to choose bits for", "Give other --rules.")
    rows = [_stored_bits(one, count) if unit == "bytes" else _bit_operations(one) for one in programs]
    bases = tuple(sum(row.values()) - sum(row[site] for site in free) for row in rows)
    return CostTable(unit, tuple(planned), {site: tuple(row[site] for row in rows) for site in free}, bases[0], bases)


def _is_free(site: str, planned: Mapping[str, Program]) -> bool:
    return all(site in program.plan and _widths(program.plan[site]) == bits for bits, program in planned.items())


def _widths(plan: SitePlan) -> str:
    return f"w{plan.weight_bits}a{plan.activation_bits}"


def _stored_bits(program: Program, count: Count) -> dict[str, int]:
    """By site the bits of its tensors; under the empty name those of no site."""
    width_of, beside = (_true_width, _table_bits) if count == "bits" else (_file_width, _offset_bits)
    sites, found = set(dict(program.sites())), {"": 0}
    codes = {name: plan for plan in program.plan.quantised if (name := _weight(program, plan.site))}
    for site in sites:
        found[site] = 0
    for name, tensor in program.state.items():
        plan, owner = codes.get(name), name.rpartition(".")[0]
        width = width_of(plan) if plan is not None else 8 * tensor.element_size()
        place = plan.site if plan is not None else owner if owner in sites else ""
        found[place] += tensor.numel() * width
    for plan in codes.values():
        found[plan.site] += beside(plan)
    return found


def _true_width(plan: SitePlan) -> int:
    return plan.weight_bits or 8


def _table_bits(plan: SitePlan) -> int:
    """Of a table of whole numbers, a byte each."""
    return 8 * plan.out_channels * 2 ** (plan.weight_bits or 8) if plan.weight_lookup else 0


def _file_width(plan: SitePlan) -> int:
    """Of a code as an export holds it, the binary ones beside it included; at most, where channels have mixed bits.

    Numbers of a table are exported themselves. At most half of the channels of mixed bits have one more, and channels
    of five are bytes.
    """
    bits = plan.weight_bits or 8
    binary = 4 if plan.weight_residual else 0
    if bits > 4 or plan.weight_lookup:
        return 8 + binary
    return 6 if _has_five(plan) else 4 + binary


def _has_five(plan: SitePlan) -> bool:
    """Whether some channels may have five bits; a binary code beside four is stored apart."""
    return plan.weight_mixed and plan.weight_bits == 4 and not plan.weight_residual


def _offset_bits(plan: SitePlan) -> int:
    """Of the offsets that let asymmetric codes be stored in four bits, and of the order of channels of mixed bits."""
    if plan.weight_symmetric or (plan.weight_bits or 8) > 4:
        return 0
    return (8 + 32 * _has_five(plan)) * plan.out_channels


def _weight(program: Program, site: str) -> str:
    """The name of the weight that a site's quantiser reads."""
    layer = next(node for name, node in program.sites() if name == site)
    quantiser = layer_inputs(layer)[1]
    weight: fx.Node = quantiser.args[0]  # type: ignore[assignment]
    return str(weight.target) if weight.op == "get_attr" else ""


def _bit_operations(program: Program) -> dict[str, int]:
    """By site."""
    found = {}
    for site, layer in program.sites():
        plan = program.plan[site]
        found[site] = multiply_adds(layer) * (plan.weight_bits or _FLOAT_BITS) * (plan.activation_bits or _FLOAT_BITS)
    return found


def multiply_adds(layer: fx.Node) -> int:
    """Of a layer, for one sample."""
    outputs, *inputs = layer_inputs(layer)[1].meta["shape"]
    values = math.prod(int(size) for size in layer.meta["shape"] if size != BATCH)
    return values * math.prod(int(size) for size in inputs) if outputs else 0


def limit_of(budget: Budget, table: CostTable, more: tuple[int, int] = (0, 0)) -> int:
    """What a plan may take, as the table counts. more: what the smallest and the largest plan take besides.

    Raises:
        PlanError: for one below the smallest plan or above the largest, with both.
    """
    smallest, largest = (end + own for end, own in zip(table.ends, more, strict=True))
    if budget.bits and budget.bits not in table.candidates:
        found = f"is none of the candidates {', '.join(table.candidates)}"
        raise PlanError(f"--budget {budget.text}", found, "Add it to --candidates.")
    if budget.bits:
        limit = table.uniform(table.candidates.index(budget.bits))
    elif budget.share is not None:
        limit = math.floor(budget.share * largest + 1e-6)
    else:
        limit = math.floor((budget.amount or 0) * _PER_UNIT[table.unit] + 1e-6)
    if not smallest <= limit <= largest:
        ends = (
            shown(table.amount(smallest), table.unit, up=True),
            shown(table.amount(largest), table.unit, down=True),
        )
        found = f"is {'below' if limit < smallest else 'above'} every plan of {', '.join(table.candidates)}"
        raise PlanError(f"--budget {budget.text}", found, f"Give one from {ends[0]} to {ends[1]}.")
    return limit
