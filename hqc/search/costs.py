"""What every site takes at every candidate width, in bits of its tensors or in bit operations.

    bits   of the site's codes at their width, and of its scales, zeros, tables and bias as they are
    BOPs   multiply-adds · weight bits · activation bits, of one sample in one call; 32 · 32 where a site stays float

Both are whole numbers, so that plans can be held against a budget exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from hqc.errors import PlanError
from hqc.passes.rewriting import layer_inputs
from hqc.plan import SitePlan
from hqc.program import BATCH, Program
from hqc.search.budget import Budget, Unit, shown

__all__ = ["CostTable", "cost_table", "limit_of"]

_FLOAT_BITS = 32
_PER_UNIT: Mapping[Unit, int] = {"bytes": 8, "BOPs": 1}


@dataclass(frozen=True)
class CostTable:
    """By site what each candidate takes; fixed: what all else takes. Bytes are counted in bits."""

    unit: Unit
    candidates: tuple[str, ...]
    sites: Mapping[str, tuple[int, ...]]
    fixed: int

    def total(self, chosen: Sequence[int]) -> int:
        """Of a plan: the number of the candidate of every site."""
        return self.fixed + sum(costs[one] for costs, one in zip(self.sites.values(), chosen, strict=True))

    @property
    def ends(self) -> tuple[int, int]:
        """Of the smallest and of the largest plan."""
        return (
            self.fixed + sum(min(costs) for costs in self.sites.values()),
            self.fixed + sum(max(costs) for costs in self.sites.values()),
        )

    def amount(self, cost: int) -> float:
        """In bytes or bit operations."""
        return cost / _PER_UNIT[self.unit]

    def text(self, cost: int) -> str:
        """For people."""
        return shown(self.amount(cost), self.unit)


def cost_table(planned: Mapping[str, Program], unit: Unit) -> CostTable:
    """From a program at every candidate width: free are the sites that have the width in each.

    Raises:
        PlanError: if no site is free.
    """
    programs = list(planned.values())
    free = [site.site for site in programs[0].plan.sites if _is_free(site.site, planned)]
    if not free:
        raise PlanError("search", "the recipe's rules leave no site to choose bits for", "Give other --rules.")
    of = _stored_bits if unit == "bytes" else _bit_operations
    rows = [of(program) for program in programs]
    fixed = sum(rows[0].values()) - sum(rows[0][site] for site in free)
    return CostTable(unit, tuple(planned), {site: tuple(row[site] for row in rows) for site in free}, fixed)


def _is_free(site: str, planned: Mapping[str, Program]) -> bool:
    return all(site in program.plan and _widths(program.plan[site]) == bits for bits, program in planned.items())


def _widths(plan: SitePlan) -> str:
    return f"w{plan.weight_bits}a{plan.activation_bits}"


def _stored_bits(program: Program) -> dict[str, int]:
    """By site the bits of its tensors; under the empty name those of no site."""
    sites, found = set(dict(program.sites())), {"": 0}
    codes = {name: plan for plan in program.plan.quantised if (name := _weight(program, plan.site))}
    for site in sites:
        found[site] = 0
    for name, tensor in program.state.items():
        plan, owner = codes.get(name), name.rpartition(".")[0]
        width = (plan.weight_bits or 8) if plan is not None else 8 * tensor.element_size()
        place = plan.site if plan is not None else owner if owner in sites else ""
        found[place] += tensor.numel() * width
    return found


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
        limit = table.total([table.candidates.index(budget.bits)] * len(table.sites))
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
