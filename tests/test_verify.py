"""What `verify` finds; each case breaks one thing in a program that is right."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx
from zoo import ZOO

from hqc.errors import PassError
from hqc.passes import FreezeIntegers, InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program, Stage, copy_graph
from hqc.verify import verify


@pytest.fixture(scope="session")
def quantised(captured: Callable[[str], Program]) -> Program:
    return run_pipeline(captured("two_sites"), [SelectLayers(), InsertHadamard(), InsertQdq((0.0, 9.0))])


def in_graph(change: Callable[[fx.Graph, dict[str, fx.Node]], object]) -> Callable[[Program], Program]:
    def apply(program: Program) -> Program:
        graph = copy_graph(program.graph)
        change(graph, {node.name: node for node in graph.nodes})
        return program.evolve(graph=graph)

    return apply


def in_state(name: str, value: torch.Tensor | None) -> Callable[[Program], Program]:
    def apply(program: Program) -> Program:
        state = {k: v for k, v in program.state.items() if k != name}
        return program.evolve(state=state if value is None else {**state, name: value})

    return apply


TABLE = "conv.activation_scale_table"
BROKEN: dict[str, tuple[Callable[[Program], Program], str]] = {
    "missing weight": (in_state("head.bias", None), "weight head.bias is missing"),
    "wrong shape": (in_state("head.bias", torch.zeros(6)), "weight head.bias is [6]; the graph says [5]"),
    "scale zero": (in_state(TABLE, torch.tensor([1.0, 0.0])), f"{TABLE} has a scale that is not positive and finite"),
    "scale negative": (in_state(TABLE, torch.tensor([1.0, -1.0])), f"{TABLE} has a scale that is not positive"),
    "scale nan": (in_state(TABLE, torch.tensor([1.0, torch.nan])), f"{TABLE} has a scale that is not positive"),
    "scale infinite": (in_state("head.weight_scale", torch.full((5,), torch.inf)), "head.weight_scale has a scale"),
    "unknown input": (lambda p: p.evolve(inputs=p.inputs[:1]), "inputs are ['sample', 'timestep']"),
    "integer operator": (lambda p: p.evolve(stage=Stage.CAPTURED), "does not belong in a program that is captured"),
    "training operator": (lambda p: p.evolve(stage=Stage.INTEGER), "does not belong in a program that is integer"),
    "foreign plan": (
        lambda p: p.evolve(plan=replace(p.plan, sites=(replace(p.plan["conv"], site="other"),))),
        "the plan names other, which the graph lacks",
    ),
    "foreign function": (
        in_graph(lambda g, n: setattr(n["silu"], "target", torch.nn.functional.silu)),
        "silu calls <function silu",
    ),
    "call_method": (in_graph(lambda g, n: setattr(n["silu"], "op", "call_method")), "silu is a call_method"),
    "order": (in_graph(lambda g, n: n["linear"].append(n["silu"])), "malformed"),
    "duplicate name": (in_graph(lambda g, n: setattr(n["silu"], "name", "linear")), "malformed"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(case: str, quantised: Program) -> None:
    verify(quantised)
    change, message = BROKEN[case]
    with pytest.raises(PassError) as caught:
        verify(change(quantised), after="the test")
    assert caught.value.where == "the test"
    assert message in caught.value.found


def test_all_violations_are_collected(quantised: Program) -> None:
    broken = in_state(TABLE, torch.zeros(2))(in_state("head.bias", None)(quantised))
    with pytest.raises(PassError) as caught:
        verify(broken)
    assert "head.bias is missing" in caught.value.found
    assert f"{TABLE} has a scale" in caught.value.found


@pytest.mark.parametrize("model", ZOO)
def test_the_zoo_verifies_at_every_stage(model: str, captured: Callable[[str], Program]) -> None:
    program = captured(model)
    verify(program)
    verify(run_pipeline(program, [SelectLayers(), InsertHadamard(), InsertQdq((0.0,))]))
    verify(run_pipeline(program, [SelectLayers(), InsertQdq((0.0,)), FreezeIntegers()]))
