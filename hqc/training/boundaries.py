"""Boundaries instead of scales and zero points: the same quantisers by what they clip at, while that learns.

    asymmetric    B_l = -below ≤ 0 ≤ above = B_u     s = (B_u - B_l)/(2ⁿ-1),  z = round(-B_l/s)
    symmetric     ±above                             s = above/q, q the largest code

`opened` puts the boundaries into a program's graph in the place of its scales and zero points, `closed` computes these
from what was learnt: no other program has boundaries. Gradients go through s and z, both of which the quantiser
differentiates (LSQ, straight-through): where x is clipped above ∂x̂/∂B_u = 1, below ∂x̂/∂B_l = 1, and elsewhere the
rounding error of x moves the one that it is nearer to.
Source: PassionSR (arXiv 2411.17106), LBQ. Own choice: z is whole, so that 0 is a code and padding with zeros is exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hqc.bits import activation_range, asymmetric_top, weight_range
from hqc.errors import PlanError
from hqc.passes.rewriting import Rewriter, rewrite
from hqc.plan import SitePlan
from hqc.program import Program, aten

__all__ = ["closed", "opened"]

_SMALLEST = 1e-8


@dataclass(frozen=True)
class _Range:
    """One operand of a site: the tensors of its quantiser, those of its boundaries, and its largest code.

    zero, below: None where codes are symmetric.
    """

    scale: str
    zero: str | None
    above: str
    below: str | None
    top: int


def _ranges(plan: SitePlan) -> Iterator[_Range]:
    """Of activations and of weights."""
    if plan.weight_mixed or plan.weight_lookup:
        found = "has mixed bits by channel" if plan.weight_mixed else "takes its weights from a table"
        raise PlanError(f"site {plan.site}", f"{found}, which has no boundaries", "Leave learn_bounds out.")
    operands = (
        ("activation", "_table", plan.activation_symmetric, plan.activation_bits, activation_range),
        ("weight", "", plan.weight_symmetric, plan.weight_bits, weight_range),
    )
    for name, ending, symmetric, bits, codes in operands:
        scale, zero, above, below = (
            f"{plan.site}.{name}_{leaf}{ending}" for leaf in ("scale", "zero", "above", "below")
        )
        if symmetric:
            yield _Range(scale, None, above, None, codes(bits or 8)[1])
        else:
            yield _Range(scale, zero, above, below, asymmetric_top(bits or 8))


def opened(program: Program) -> Program:
    """The program with boundaries at every trained site.

    Raises:
        PlanError: for a site whose codes have none.
    """
    edit = rewrite(program)
    readers = {str(node.target): node for node in edit.graph.nodes if node.op == "get_attr"}
    for plan in _trained(program):
        for one in _ranges(plan):
            _open(edit, one, readers)
    return edit.finish()


def _trained(program: Program) -> Iterator[SitePlan]:
    return (plan for plan in program.plan.quantised if plan.trained)


def _open(edit: Rewriter, one: _Range, readers: dict[str, fx.Node]) -> None:
    scale = readers[one.scale]
    value, first = edit.state[one.scale], scale.next
    if one.zero is None or one.below is None:
        above = edit.weight(one.above, value * one.top, first)
        scale.replace_all_uses_with(edit.call(first, aten.div.Tensor, above, float(one.top), like=scale))
        return
    stored = readers[one.zero]
    zero = edit.state[one.zero].clamp(0, one.top)
    above = edit.weight(one.above, ((one.top - zero) * value).clamp_min(_SMALLEST), first)
    below = edit.weight(one.below, (zero * value).clamp_min(_SMALLEST), first)
    span = edit.call(first, aten.add.Tensor, above, below, like=scale)
    found = edit.call(first, aten.div.Tensor, span, float(one.top), like=scale)
    scale.replace_all_uses_with(found)
    stored.replace_all_uses_with(edit.call(found.next, aten.div.Tensor, below, found, like=stored))


def closed(learnt: Program, program: Program) -> Program:
    """The program with the scales and zero points of the boundaries that its opened one has learnt."""
    state = {name: learnt.state.get(name, tensor) for name, tensor in program.state.items()}
    for plan in _trained(program):
        for one in _ranges(plan):
            state |= dict(_quantiser(one, learnt.state[one.above], learnt.state.get(one.below or "")))
    return program.evolve(state=state)


def _quantiser(one: _Range, above: Tensor, below: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Scale and zero point by name; the operations of the opened graph, so that no value changes."""
    if below is None or one.zero is None:
        yield one.scale, above / float(one.top)
        return
    scale = (above + below) / float(one.top)
    yield one.scale, scale
    yield one.zero, torch.round((below / scale).clamp(0, one.top))
