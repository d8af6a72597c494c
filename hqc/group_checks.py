"""Scales of groups of channels: whether a site has them where the plan says so, and what does not take them."""

from typing import Any

import torch
from torch import fx

import hqc.ops  # noqa: F401  (registers the operators)
from hqc.bits import activation_range
from hqc.bounds import GROUPED
from hqc.errors import ExportError, PlanError
from hqc.ops.grouped import group_count
from hqc.plan import SitePlan
from hqc.program import Program, is_op

__all__ = ["group_problem", "refuse_groups", "refuse_training_groups"]

ops = torch.ops.hqc
_DO = "Use target portable or the torch runtime, or the recipe svdquant, whose scales are of whole channels."


def refuse_groups(program: Program, where: str) -> None:
    """Refuses scales of groups where products are of integers.

    Raises:
        ExportError: naming the first site that has some.
    """
    for plan in program.plan.sites:
        if plan.grouped:
            found = f"takes integer products of whole rows; site {plan.site} ({plan.widths}) has scales of groups"
            found += " or of the values themselves"
            raise ExportError(where, found, _DO)


def refuse_training_groups(program: Program, step: str) -> None:
    """Refuses to train scales of groups, which have no gradient.

    Raises:
        PlanError: naming the first site that has some.
    """
    for plan in program.plan.sites:
        if plan.grouped:
            found = f"site {plan.site} has scales of groups ({plan.widths}), which no step trains"
            raise PlanError(step, found, "Leave the training out, or groups and dynamic activations of insert_qdq.")


def group_problem(program: Program, plan: SitePlan, quantiser: Any, weight: Any) -> str:
    """What is wrong with the scales of a site's groups.

    quantiser: of its activation, training's or frozen. weight: what the layer reads, quantised or dequantised.
    """
    for name, node, group in (("activation", quantiser, plan.activation_group), ("weight", weight, plan.weight_group)):
        if is_op(node, *GROUPED) != bool(group):
            return f"the plan and the graph do not agree about groups of its {name}"
        if group and node.args[-1] != group:
            return f"its {name} has groups of {node.args[-1]} channels; the plan says {group}"
    return _weight_problem(program, plan, weight) or _activation_problem(plan, quantiser)


def _weight_problem(program: Program, plan: SitePlan, weight: Any) -> str:
    if not plan.weight_group:
        return ""
    scale, axis = weight.args[1], weight.args[-2]
    if scale.op != "get_attr" or scale.target != f"{plan.site}.weight_scale" or scale.target not in program.state:
        return "its weight's scales are not stored"
    if axis != 1:
        return f"its weight has groups along axis {axis}; expected 1"
    found, groups = program.state[scale.target].shape, group_count(plan.in_channels, plan.weight_group)
    return "" if tuple(found[:2]) == (plan.out_channels, groups) else f"its weight has scales {list(found)}"


def _activation_problem(plan: SitePlan, quantiser: Any) -> str:
    if not plan.activation_group:
        return ""
    scale, axis = quantiser.args[1], quantiser.args[-2]
    if axis != (1 if plan.kind == "conv2d" else -1):
        return f"its activation has groups along axis {axis}"
    top = activation_range(plan.activation_bits or 8)[1]
    wanted = (quantiser.args[0], top, axis, plan.activation_group)
    own = isinstance(scale, fx.Node) and is_op(scale, ops.dynamic_scale.default) and tuple(scale.args) == wanted
    return "" if own else "its activation's scales are not those of its own values"
