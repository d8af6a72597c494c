"""Mixed weights with random bits by output channel, as no calibration chooses them."""

import torch
from torch import Tensor

from hqc.calibration.channel_bits import residual_step
from hqc.calibration.weights import source_weight
from hqc.passes.insert_qdq import spanning_range
from hqc.passes.rewriting import layer_inputs
from hqc.program import Program

__all__ = ["mixed_channels"]


def mixed_channels(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Tops, scales and zero points of every mixed weight: a third of its channels has a bit more, a third one less.

    The bit more of a residual weight is a binary code.
    """
    state: dict[str, Tensor] = {}
    for site, layer in program.sites():
        if not (plan := program.plan[site]).weight_mixed:
            continue
        count = plan.out_channels
        widths, order = torch.full((count,), float(plan.weight_bits)), torch.randperm(count, generator=generator)
        third = count // 3
        widths[order[:third]] += 0 if plan.weight_residual else 1
        widths[order[count - third :]] -= 1
        top = torch.exp2(widths) - 1
        found = spanning_range(program.state[source_weight(layer_inputs(layer)[1])], top)
        state |= {f"{site}.weight_{leaf}": t for leaf, t in zip(("top", "scale", "zero"), (top, *found), strict=True)}
        if plan.weight_residual:
            salient = torch.zeros(count)
            salient[order[:third]] = 1
            weight = program.state[source_weight(layer_inputs(layer)[1])]
            state[f"{site}.weight_salient"] = salient
            state[f"{site}.weight_residual_scale"] = residual_step(weight, *found, top)
    return state
