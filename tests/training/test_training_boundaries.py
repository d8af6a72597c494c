"""Learnt boundaries: their quantiser, its gradients against finite differences, and what they become in a program."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hqc.calibration import CalibrateWeights
from hqc.errors import PlanError
from hqc.passes import InsertQdq, SelectLayers
from hqc.passes.insert_qdq import WeightRange
from hqc.pipeline import run_pass, run_pipeline, run_procedure
from hqc.plan import QuantPlan
from hqc.program import Program
from hqc.sampling import Work
from hqc.structure import site_problems
from hqc.training.boundaries import closed, opened
from hqc.training.module import training_module
from hqc.verify import verify

Captured = Callable[[str], Program]


def _quantised(captured: Captured, bits: str = "w4a4", weight: WeightRange = "asymmetric") -> Program:
    program = captured("two_sites").evolve(plan=QuantPlan("x", bits))
    steps = [SelectLayers(rules="all"), InsertQdq((0.0,), activation="asymmetric", weight=weight)]
    program = run_procedure(run_pipeline(program, steps), CalibrateWeights(), Work(program))
    state = dict(program.state)
    for plan in program.plan.quantised:
        state[f"{plan.site}.activation_scale_table"] = torch.tensor([0.21])
        if not plan.activation_symmetric:
            state[f"{plan.site}.activation_zero_table"] = torch.tensor([6.0])
    return program.evolve(state=state)


@pytest.mark.parametrize("bits", ["w4a4", "w8a8", "w6a8"])
@pytest.mark.parametrize("weight", ["symmetric", "asymmetric"])
def test_nothing_changes_there_and_back(captured: Captured, bits: str, weight: WeightRange) -> None:
    program = _quantised(captured, bits, weight)
    live = opened(program)
    args = program.example_inputs(3, seed=1)
    wanted = program.module()(*args)
    # A scale that was multiplied and divided again may round otherwise, and a code at a boundary flip for it.
    assert float((training_module(live, 3)(*args) - wanted).norm() / wanted.norm()) < 1e-2
    back = closed(live, program)
    verify(back)
    assert site_problems(back) == []
    for name, tensor in program.state.items():
        torch.testing.assert_close(back.state[name], tensor, rtol=1e-6, atol=1e-7)


def test_which_tensors_there_are(captured: Captured) -> None:
    leaves = {name.rpartition(".")[2] for name in opened(_quantised(captured)).state}
    assert {"activation_below_table", "activation_above_table", "weight_below", "weight_above"} <= leaves
    assert not leaves & {"activation_scale_table", "activation_zero_table", "weight_scale", "weight_zero"}
    leaves = {name.rpartition(".")[2] for name in opened(_quantised(captured, "w8a8")).state}
    assert {"activation_above_table", "weight_above"} <= leaves
    assert not leaves & {"activation_below_table", "weight_below"}


def _surrogate(x: np.ndarray, below: float, above: float, start: tuple[float, float], top: int) -> np.ndarray:
    """The quantiser with every rounding error frozen at what it is at `start`: what straight-through differentiates."""
    s0 = (start[0] + start[1]) / top
    z0 = start[0] / s0
    z_error, codes = round(z0) - z0, np.round(x / s0)
    low, high = -round(z0), top - round(z0)
    s = (below + above) / top
    z = below / s + z_error
    inside = x + (codes - x / s0) * s
    return np.where(codes < low, -z * s, np.where(codes > high, (top - z) * s, inside))


def test_gradients_are_those_of_finite_differences() -> None:
    """Of Σ g·x̂ to both boundaries, values on all sides of them."""
    top, values = 15, torch.linspace(-3, 4, 41)
    gradient = torch.cos(torch.arange(41.0))
    above = torch.tensor([2.1], requires_grad=True)
    below = torch.tensor([1.3], requires_grad=True)
    scale = (above + below) / float(top)
    zero = torch.ops.hqc.round_ste((below / scale).clamp(0, top))
    found = torch.ops.hqc.fake_quantize_bounded(values[None], scale, -zero, top - zero)
    (found[0] * gradient).sum().backward()
    x, g, start = values.double().numpy(), gradient.double().numpy(), (1.3, 2.1)

    def total(b: float, a: float) -> float:
        return float((_surrogate(x, b, a, start, top) * g).sum())

    step = 1e-4
    wanted_below = (total(1.3 + step, 2.1) - total(1.3 - step, 2.1)) / (2 * step)
    wanted_above = (total(1.3, 2.1 + step) - total(1.3, 2.1 - step)) / (2 * step)
    assert below.grad is not None
    assert above.grad is not None
    assert float(below.grad) == pytest.approx(wanted_below, rel=1e-3)
    assert float(above.grad) == pytest.approx(wanted_above, rel=1e-3)


def test_what_is_clipped_moves_its_own_boundary_alone() -> None:
    """x̂ = B_u above and B_l below, whatever z rounds to: LBQ's gradients are 1 and 0 there."""
    for value, wanted in ((9.0, (0.0, 1.0)), (-9.0, (-1.0, 0.0))):
        above, below = torch.tensor([2.1], requires_grad=True), torch.tensor([1.3], requires_grad=True)
        scale = (above + below) / 15.0
        zero = torch.ops.hqc.round_ste(below / scale)
        torch.ops.hqc.fake_quantize_bounded(torch.tensor([[value]]), scale, -zero, 15 - zero).sum().backward()
        # z was rounded: by up to half a code of the boundary's own share.
        found = tuple(float(one.grad) for one in (below, above) if one.grad is not None)
        assert found == pytest.approx(wanted, abs=0.5 / 15 + 1e-6)


def test_gradients_reach_the_programs_boundaries(captured: Captured) -> None:
    """Through the graph as it is trained."""
    program = _quantised(captured)
    live = opened(program)
    module = training_module(live, 2)
    names = [name for name in live.state if name.endswith(("above", "below", "above_table", "below_table"))]
    parameters = {name: module.get_parameter(name).requires_grad_(True) for name in names}
    args = program.example_inputs(2, seed=3)
    output = module(*args)
    found = torch.autograd.grad(output.square().sum(), list(parameters.values()))
    for tensor in program.state.values():
        tensor.requires_grad_(False)
    assert all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in found), dict(
        zip(names, found, strict=True)
    )


def test_learnt_boundaries_become_scales_and_zero_points(captured: Captured) -> None:
    program = _quantised(captured)
    live = opened(program)
    state: dict[str, Tensor] = dict(live.state)
    state["conv.activation_below_table"], state["conv.activation_above_table"] = (
        torch.tensor([1.0]),
        torch.tensor([2.0]),
    )
    back = closed(live.evolve(state=state), program)
    assert float(back.state["conv.activation_scale_table"]) == pytest.approx(3 / 15)
    assert float(back.state["conv.activation_zero_table"]) == 5


def test_mixed_bits_have_no_boundaries(captured: Captured) -> None:
    program = run_pass(captured("two_sites"), SelectLayers(rules="all"))
    with pytest.raises(PlanError, match="has mixed bits by channel, which has no boundaries"):
        opened(run_pass(program, InsertQdq((0.0,), weight="mixed")))
