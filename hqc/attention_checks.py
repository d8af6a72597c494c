"""What passes and exports rely on at attention that is written out: its form, its quantisers, the plan's numbers."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx

from hqc.attention_plan import AttentionPlan
from hqc.attentions import PARTS, WrittenOut, part_name, written_out_from
from hqc.bits import activation_range
from hqc.code_checks import codes_fit
from hqc.program import Program, Stage, aten, is_op

__all__ = ["ATTENTION_QUANTISERS", "ATTENTION_ROLES", "attention_problems"]

ops = torch.ops.hqc
ATTENTION_QUANTISERS = ("operand_quantizer", "softmax_quantizer")
"""Of those that have gradients."""
ATTENTION_ROLES = (*ATTENTION_QUANTISERS, "operand_codes", "operand")
"""Of what stands within attention that is written out."""


def attention_problems(program: Program) -> list[str]:
    """What is wrong with attention in a graph whose roles fit their operators."""
    return list(_problems(program))


def _problems(program: Program) -> Iterator[str]:
    found = {node: written_out_from(node) for node in program.graph.nodes if node.meta.get("role") == "attention"}
    if strange := [node.name for node, one in found.items() if one is None]:
        yield f"{strange[0]} is no attention as open_attention writes it"
        return
    there = [one for one in found.values() if one is not None]
    for counted, what in (([one.name for one in there], "attentions are"), (_planned(program), "plans are for")):
        if twice := [name for name, count in Counter(counted).items() if count > 1]:
            yield f"two {what} {twice[0]}"
    plans = {plan.name: plan for plan in program.plan.attentions}
    if missing := [name for name in plans if name not in {one.name for one in there}]:
        yield f"the plan names the attention {missing[0]}, which the graph lacks"
    own = {node for one in there for real in one.quantisers.values() for node in (real, real.args[0])}
    if stray := [n.name for n in program.graph.nodes if n.meta.get("role") in ATTENTION_ROLES and n not in own]:
        yield f"{stray[0]} belongs to no attention"
    for one in there:
        yield from (f"attention {one.name}: {text}" for text in _of_one(program, one, plans.get(one.name)))


def _planned(program: Program) -> list[str]:
    return [plan.name for plan in program.plan.attentions]


def _of_one(program: Program, found: WrittenOut, plan: AttentionPlan | None) -> Iterator[str]:
    operand, softmax = (None, None) if plan is None else (plan.operand_bits, plan.softmax_bits)
    for part in PARTS:
        wanted, real = softmax if part == "softmax" else operand, found.quantisers.get(part)
        if (wanted is None) != (real is None):
            yield f"the plan and the graph do not agree about its {part}"
        elif real is not None and wanted is not None and plan is not None:
            symmetric = part == "softmax" or plan.operands_symmetric
            if problem := _of_quantiser(program, part_name(found.name, part), real, wanted, symmetric):
                yield f"its {part} {problem}"


def _of_quantiser(program: Program, name: str, real: fx.Node, bits: int, symmetric: bool) -> str:
    quantiser = real.args[0] if is_op(real, ops.dequantize.default) else real
    if real.meta.get("site") != name or real.meta.get("role") not in ATTENTION_ROLES:
        return "has a quantiser of something else"
    assert isinstance(quantiser, fx.Node)
    softmax = is_op(quantiser, ops.softmax_quantize.default)
    tables = ["activation_scale_table", *(["log2_table"] if softmax else [])]
    if not symmetric and program.stage != Stage.INTEGER:
        tables.append("activation_zero_table")
    if missing := [table for table in tables if f"{name}.{table}" not in program.state]:
        return f"has no {missing[0]}"
    if not all(is_op(value, aten.index_select.default) for value in quantiser.args[1 : 3 if softmax else 2]):
        return "has scales that are not looked up"
    return "" if _codes_fit(program, quantiser, bits, symmetric) else f"has codes that are not those of {bits} bits"


def _codes_fit(program: Program, quantiser: fx.Node, bits: int, symmetric: bool) -> bool:
    if is_op(quantiser, ops.softmax_quantize.default):
        return bool(quantiser.args[3] == bits)
    return codes_fit(program, quantiser, activation_range(bits), bits, symmetric)
