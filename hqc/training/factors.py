"""Live factors: smoothing that learns, with its weight and bias following, and quantisers that span what they meet.

    W̃ = (λ·W),  b̃ = b + W·δ                 of the present λ and δ, so that without quantisers nothing changes
    B_l = min(x̃, 0),  B_u = max(x̃, 0)       of every quantiser at every call; of a weight by output channel

`opened` puts both into a program's graph, `closed` folds what was learnt into stored weights and biases: no other
program has them. Gradients reach λ and δ through x̃, through W̃ and b̃, and through the boundaries, which are functions of
both. Source: PassionSR (arXiv 2411.17106), LET and stage A of its calibration (bounds are initialised anew each step).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from hqc.bits import activation_range, asymmetric_top, weight_range
from hqc.errors import PlanError
from hqc.ops.straight_through import RoundSte
from hqc.passes.insert_smoothing import output_shift
from hqc.passes.rewriting import Rewriter, layer_inputs, rewrite
from hqc.plan import SitePlan
from hqc.program import Program, aten

__all__ = ["closed", "opened"]

ops = torch.ops.hqc
_SMALLEST = 1e-8


def opened(program: Program) -> Program:
    """The program with live factors at every smoothed site, and bounds of the moment at every quantised one.

    Raises:
        PlanError: if no site is smoothed, or codes are such that bounds do not decide them.
    """
    if not any(_smoothed(program)):
        raise PlanError("learn_factors", "finds no site with factors", "Put insert_smoothing before it.")
    if odd := [plan.site for plan in program.plan.quantised if plan.weight_mixed or plan.weight_lookup]:
        raise PlanError(f"site {odd[0]}", "has mixed bits or a table, which no bounds decide", "Leave it symmetric.")
    edit = rewrite(program)
    for plan in _smoothed(program):
        _live(edit, plan)
    for node in list(edit.graph.nodes):
        if node.meta.get("role") in ("activation_quantizer", "weight_quantizer"):
            _spanning(edit, node, program.plan[node.meta["site"]])
    return edit.finish()


def _smoothed(program: Program) -> Iterator[SitePlan]:
    return (plan for plan in program.plan.quantised if plan.smoothed)


def _live(edit: Rewriter, plan: SitePlan) -> None:
    """λ·W in the place of the stored weight, and b + W·δ in that of the bias; W is the weight without its factors."""
    layer = edit.layers[plan.site]
    _, quantiser, bias = layer_inputs(layer)
    stored: fx.Node = quantiser.args[0]  # type: ignore[assignment]
    reader = quantiser
    plain = edit.state[str(stored.target)] * edit.state[f"{plan.site}.smoothing"]
    weight = edit.weight(f"{plan.site}.weight_plain", plain, reader)
    factors = edit.weight(f"{plan.site}.smoothing", edit.state[f"{plan.site}.smoothing"], reader)
    quantiser.replace_input_with(stored, edit.call(reader, aten.div.Tensor, weight, factors, like=stored))
    if not plan.shifted or bias is None:
        return
    shift = edit.state[f"{plan.site}.shift"]
    own = edit.state[f"{plan.site}.bias_shifted"] - output_shift(plain, shift)
    base = edit.weight(f"{plan.site}.bias_plain", own, layer)
    live = edit.weight(f"{plan.site}.shift", shift, layer)
    moved = edit.call(layer, output_shift, weight, live, like=bias)
    layer.replace_input_with(bias, edit.call(layer, aten.add.Tensor, base, moved, like=bias))


def _spanning(edit: Rewriter, quantiser: fx.Node, plan: SitePlan) -> None:
    """Scale and codes of what the quantiser meets, in the place of its tables."""
    rows = quantiser.meta["role"] == "weight_quantizer"
    bits = (plan.weight_bits if rows else plan.activation_bits) or 8
    symmetric = plan.weight_symmetric if rows else plan.activation_symmetric
    x = quantiser.args[0]
    if symmetric:
        low, high = weight_range(bits) if rows else activation_range(bits)
        scale = edit.call(quantiser, _reach_scale, x, high, rows)
        quantiser.args = (x, scale, low, high)
        return
    found = edit.call(quantiser, _span, x, asymmetric_top(bits), rows)
    quantiser.args = (x, *(edit.call(quantiser, _part, found, index) for index in range(3)))


def _part(values: tuple[Tensor, ...], index: int) -> Tensor:
    return values[index]


def _ends(x: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """Least and largest value and 0, of every row, or of all as one number for every row."""
    flat = x.flatten(1)
    low, high = (flat.amin(1), flat.amax(1)) if rows else (flat.amin(), flat.amax())
    return low.clamp_max(0).expand(len(x)), high.clamp_min(0).expand(len(x))


def _reach_scale(x: Tensor, top: int, rows: bool) -> Tensor:
    """max|x|/q [N]; 1 for a row of zeros."""
    low, high = _ends(x, rows)
    reach = torch.maximum(-low, high)
    return torch.where(reach > _SMALLEST, reach / top, torch.ones_like(reach))


def _span(x: Tensor, top: int, rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(s, -z, t - z) [N] of the span of the values and 0, z whole; s = 1 for a row of zeros."""
    low, high = _ends(x, rows)
    span = high - low
    scale = torch.where(span > _SMALLEST, span / top, torch.ones_like(span))
    zero: Tensor = RoundSte.apply(-low / scale)  # type: ignore[no-untyped-call]
    return scale, -zero, top - zero


def closed(learnt: Program, program: Program) -> Program:
    """The program with the factors and shifts that its opened one has learnt, folded into weights and biases."""
    state, layers = (
        {name: learnt.state.get(name, tensor) for name, tensor in program.state.items()},
        dict(program.sites()),
    )
    for plan in _smoothed(program):
        plain = learnt.state[f"{plan.site}.weight_plain"]
        name = str(layer_inputs(layers[plan.site])[1].args[0].target)  # type: ignore[union-attr]
        state[name] = plain / state[f"{plan.site}.smoothing"]
        if plan.shifted:
            moved = output_shift(plain, state[f"{plan.site}.shift"])
            state[f"{plan.site}.bias_shifted"] = learnt.state[f"{plan.site}.bias_plain"] + moved
    return program.evolve(state=state)
