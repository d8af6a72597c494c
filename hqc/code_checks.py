"""Codes of quantisers against the bits that the plan gives them."""

from typing import Any

import torch
from torch import fx

import hqc.ops  # noqa: F401  (registers the operators)
from hqc.bits import activation_range, asymmetric_top, weight_range
from hqc.bounds import bounds_of
from hqc.errors import ExportError
from hqc.plan import SitePlan
from hqc.program import Program, aten, is_op

__all__ = ["activation_codes_fit", "codes_fit", "weight_codes_problem"]

ops = torch.ops.hqc


def activation_codes_fit(program: Program, plan: SitePlan, quantiser: fx.Node) -> bool:
    """Whether the codes that a site reads are those of its plan; of an asymmetric site the timestep picks them."""
    bits, bounds = plan.activation_bits, quantiser.args[2:4]
    if plan.activation_group:
        return bounds == activation_range(bits or 8)
    if not plan.activation_symmetric and not all(is_op(bound, aten.index_select.default) for bound in bounds):
        return False
    return codes_fit(program, quantiser, activation_range(bits or 8), bits, plan.activation_symmetric)


def weight_codes_problem(program: Program, plan: SitePlan, quantiser: fx.Node) -> str:
    """What is wrong with the codes of a site's weight; empty for nothing."""
    bits = plan.weight_code_bits
    if plan.weight_group:
        fit = quantiser.args[2:4] == weight_range(bits)
        return "" if fit else f"its weight's codes are not those of {bits} bits"
    if not plan.weight_mixed:
        fit = codes_fit(program, quantiser, weight_range(bits), bits, plan.weight_symmetric)
        return "" if fit else f"its weight's codes are not those of {bits} bits"
    span = _span(program, quantiser)
    if plan.weight_residual and (problem := _residual_problem(program, plan, quantiser)):
        return problem
    if span is None:
        return f"its weight's codes are not those of about {bits} bits"
    fewer, same, more = (span == asymmetric_top(b) for b in (bits - 1, bits, bits + 1))
    if plan.weight_residual:
        salient = program.state[f"{plan.site}.weight_salient"] == 1
        same, more = same & ~salient, same & salient
    if not bool((fewer | same | more).all()) or int(fewer.sum()) != int(more.sum()):
        return f"its weight's channels have not {bits - 1} to {bits + 1} bits, {bits} in the mean"
    return ""


def _residual_problem(program: Program, plan: SitePlan, quantiser: fx.Node) -> str:
    """What is wrong with the step of a weight's binary codes: a scale a channel, times 1 or 0."""
    if not is_op(quantiser, ops.fake_quantize_residual.default):
        return "its weight has no binary codes; the plan says that it has"
    step: Any = quantiser.args[4]
    names = [f"{plan.site}.weight_residual_scale", f"{plan.site}.weight_salient"]
    stored = [str(one.target) for one in step.args if isinstance(one, fx.Node) and one.op == "get_attr"]
    if not is_op(step, aten.mul.Tensor) or stored != names or any(name not in program.state for name in names):
        return "its weight's binary codes have no stored step"
    flags = program.state[names[1]]
    return "" if bool(((flags == 0) | (flags == 1)).all()) else "its salient channels are not marked by 1, others by 0"


def codes_fit(
    program: Program, quantiser: fx.Node, symmetric_range: tuple[int, int], bits: int | None, symmetric: bool
) -> bool:
    """Whether a quantiser's codes are those of its bits: one range, or ranges of 2ⁿ codes that hold 0."""
    if symmetric:
        return quantiser.args[2:] == symmetric_range
    span = _span(program, quantiser)
    return span is not None and bool((span == asymmetric_top(bits or 8)).all())


def _span(program: Program, quantiser: fx.Node) -> torch.Tensor | None:
    """Largest less least code of ranges that hold 0, by row; None for other ranges."""
    try:
        lookups = bounds_of(quantiser, program).lookups
    except ExportError:
        return None
    if lookups is None or lookups.lows.shape != lookups.highs.shape:
        return None
    holds_zero = bool((lookups.lows <= 0).all() & (lookups.highs >= 0).all())
    return lookups.highs - lookups.lows if holds_zero else None
