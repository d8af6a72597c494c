"""Live factors: equal numbers without quantisers, gradients against finite differences, folded weights and biases."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hqc.calibration import CalibrateActivations, CalibrateWeights
from hqc.capture import Source, trace
from hqc.errors import PlanError
from hqc.export.reference import without_quantisers
from hqc.passes import InsertQdq, InsertSmoothing, SelectLayers
from hqc.passes.insert_qdq import Range
from hqc.pipeline import run_pass, run_pipeline, run_procedure
from hqc.program import InputSpec, Origin, Program
from hqc.sampling import Sampler, Task, Work
from hqc.sampling.one_call import OneCall
from hqc.structure import site_problems
from hqc.training import Group, InImageSpace, LearnBounds, LearnFactors
from hqc.training.factors import closed, opened
from hqc.training.module import training_module
from hqc.verify import verify

Captured = Callable[[str], Program]


class _Net(nn.Module):
    """A padded convolution, an unpadded 1×1 one, a padded 1×1 one, and a linear layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.bordered = nn.Conv2d(8, 4, 1, padding=1)
        self.linear = nn.Linear(4, 6, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = torch.relu(self.wide(sample)) + timestep.view(-1, 1, 1, 1) * 1e-3
        h = self.bordered(self.point(torch.relu(h)))
        return self.linear(torch.relu(h).permute(0, 2, 3, 1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def smoothed() -> Program:
    inputs = (InputSpec("sample", ("N", 4, 6, 6)), InputSpec("timestep", ("N",)))
    program = trace(Source(_Net(), inputs, Origin(source="net")))
    return run_pipeline(program, [SelectLayers(rules="all"), InsertSmoothing(shift=True)])


def _moved(program: Program, seed: int = 2) -> Program:
    """With other factors and shifts, as training may make them."""
    generator, state = torch.Generator().manual_seed(seed), dict(program.state)
    for name, tensor in program.state.items():
        if name.endswith(".smoothing"):
            state[name] = tensor * (0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith(".shift"):
            state[name] = torch.randn(tensor.shape, generator=generator)
    return program.evolve(state=state)


def test_a_shift_only_where_a_bias_takes_it_back(smoothed: Program) -> None:
    assert {plan.site: plan.shifted for plan in smoothed.plan.sites} == {
        "wide": False,
        "point": True,
        "bordered": False,
        "linear": True,
    }
    assert smoothed.state["linear.bias_shifted"].shape == (6,)


def test_without_quantisers_nothing_changes(smoothed: Program) -> None:
    """Whatever λ and δ are: weights and biases follow, in the graph and when they are folded."""
    program = run_pass(smoothed, InsertQdq((0.0,), activation="asymmetric"))
    live = _moved(opened(program))
    folded, args = closed(live, program), program.example_inputs(3, seed=4)
    verify(folded)
    assert site_problems(folded) == []
    for one in (live, folded):
        plain = without_quantisers(one)
        assert plain is not None
        torch.testing.assert_close(plain.module()(*args), smoothed.module()(*args), rtol=1e-4, atol=1e-5)
    assert bool((folded.state["point.bias_shifted"] != program.state["point.bias_shifted"]).any())


@pytest.mark.parametrize("activation", ["asymmetric", "symmetric"])
def test_quantisers_span_what_they_meet(smoothed: Program, activation: Range) -> None:
    """As min-max quantisers computed by hand: of the whole batch, and of every output channel."""
    program = run_pass(smoothed, InsertQdq((0.0,), activation=activation))
    live = _moved(opened(program))
    args = program.example_inputs(2, seed=6)
    x, state = args[0], live.state
    smooth = x * state["wide.smoothing"]
    if activation == "asymmetric":
        low, high = min(float(smooth.min()), 0.0), max(float(smooth.max()), 0.0)
        s = (high - low) / 15
        z = round(-low / s)
        quantised = s * (torch.clamp(torch.round(smooth / s), -z, 15 - z))
    else:
        s = float(smooth.abs().max()) / 7
        quantised = s * torch.clamp(torch.round(smooth / s), -7, 7)
    weight = state["wide.weight_plain"] / state["wide.smoothing"]
    scale = weight.flatten(1).abs().amax(1).view(-1, 1, 1, 1) / 7
    codes = torch.clamp(torch.round(weight / scale), -8, 7)
    wanted = torch.nn.functional.conv2d(quantised, codes * scale, state["wide.bias"], padding=1)
    found = _value(live, dict(live.sites())["wide"].name, args)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def _value(program: Program, name: str, args: tuple[Tensor, ...]) -> Tensor:
    """What a node gives."""
    module = program.module()
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.args = (next(node for node in module.graph.nodes if node.name == name),)
    module.recompile()
    return module(*args)  # type: ignore[no-any-return]


class _Frozen:
    """Quantisers whose rounding errors stay what they were at first: what straight-through differentiates."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Tensor, ...]] = {}

    def __call__(self, name: str, x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
        def rows(value: Tensor | int) -> Tensor:
            return torch.as_tensor(value, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))

        s, least, most = rows(scale), rows(low), rows(high)
        if name not in self.kept:
            codes = torch.round(x / s)
            self.kept[name] = codes - x / s, codes < least, codes > most
        error, below, above = self.kept[name]
        return torch.where(below, s * least, torch.where(above, s * most, x + s * error))


class _FrozenRun(fx.Interpreter):
    """A live program in doubles."""

    def __init__(self, program: Program, frozen: _Frozen) -> None:
        super().__init__(program.module())
        self.frozen = frozen

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return self.module.get_parameter(str(n.target)).double()
        if n.meta.get("role") in ("activation_quantizer", "weight_quantizer"):
            x, *rest = self.fetch_args_kwargs_from_env(n)[0]
            return self.frozen(n.name, x, *rest)
        return super().run_node(n)


@pytest.mark.parametrize("leaf", ["point.smoothing", "point.shift", "wide.smoothing", "linear.shift"])
def test_gradients_are_those_of_finite_differences(smoothed: Program, leaf: str) -> None:
    """Of Σ g·y to λ⁻¹ and δ: through x̃, W̃, b̃ and through the bounds, which span x̃ and W̃; rounding errors stay."""
    program = run_pass(smoothed, InsertQdq((0.0,), activation="symmetric"))
    live = _moved(opened(program))
    args = program.example_inputs(2, seed=7)
    module = training_module(live, 2)
    parameter = module.get_parameter(leaf).requires_grad_(True)
    output = module(*args)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(8))
    (output * weights).sum().backward()
    assert parameter.grad is not None
    found, frozen = parameter.grad.flatten().clone(), _Frozen()
    parameter.requires_grad_(False)

    def total(place: int, step: float) -> float:
        values = live.state[leaf].detach().double().flatten().clone()
        values[place] += step
        moved = live.evolve(state={**live.state, leaf: values.view(live.state[leaf].shape)})
        result = _FrozenRun(moved, frozen).run(*(a.double() for a in args))
        return float((result * weights).sum())

    total(0, 0.0)  # keeps the rounding errors
    step, scale = 1e-5, float(found.abs().max())
    for place in range(0, len(found), 3):
        wanted = (total(place, step) - total(place, -step)) / (2 * step)
        assert float(found[place]) == pytest.approx(wanted, abs=2e-3 * scale), place


def test_learning_finds_factors_and_bounds(smoothed: Program) -> None:
    """One input channel is 30 times as large as the others: factors learn that, then bounds what to clip."""
    sizes = torch.tensor([30.0, 1.0, 1.0, 1.0]).view(4, 1, 1)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return sizes * torch.randn(n, 4, 6, 6, generator=generator)

    def error(one: Program) -> float:
        x = draw(64, torch.Generator().manual_seed(77))
        args, module = (x, torch.full((64,), 5.0)), smoothed.module()
        return float((training_module(one, 64)(*args) - module(*args)).square().mean())

    plan = replace(smoothed.plan, bits="w6a6")
    plan = plan.with_sites({p.site: replace(p, weight_bits=6, activation_bits=6) for p in plan.sites})
    program = run_pass(smoothed.evolve(plan=plan), InsertQdq((5.0,), activation="asymmetric"))
    task = Task(lambda: OneCall(5.0), (4, 6, 6), draw_sample=draw)
    work = Work(smoothed, task, Sampler(num_inference_steps=1))
    step = LearnFactors(
        losses=(InImageSpace(),), groups=(Group("*.smoothing", rate=3e-2, relative="own", positive=True),)
    )
    found = run_procedure(program, replace(step, updates=120, batch_size=8), work)
    assert found.stage == program.stage
    assert error(opened(found)) < 0.7 * error(opened(program))
    factors = found.state["wide.smoothing"].flatten()
    assert float(factors[0]) == float(factors.min())
    calibrated = run_procedure(run_procedure(found, CalibrateWeights(), work), CalibrateActivations(samples=16), work)
    state = {name: t * 1.6 if name.endswith("scale_table") else t for name, t in calibrated.state.items()}
    loose = calibrated.evolve(state=state)
    bounds = LearnBounds(losses=(InImageSpace(),), updates=120, batch_size=8)
    bounds = replace(bounds, groups=tuple(replace(group, rate=1e-2) for group in bounds.groups))
    tight = run_procedure(loose, bounds, work)
    assert error(tight) < 0.7 * error(loose)


def test_a_program_without_factors_is_refused(captured: Captured) -> None:
    program = run_pipeline(captured("two_sites"), [SelectLayers(rules="all"), InsertQdq((0.0,))])
    with pytest.raises(PlanError, match="learn_factors: finds no site with factors"):
        opened(program)
