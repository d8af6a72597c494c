"""What stands at the sites: every program that the passes make is right, and what does not fit the plan is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from zoo import PLAIN, ZOO

from hqc.checking import check_calls
from hqc.passes import (
    AttachBranch,
    AttachLora,
    DropSingleKeyAttention,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    InsertSmoothing,
    MergeLora,
    PackInt4,
    RotateWeights,
    SelectLayers,
    SplitDigits,
)
from hqc.pipeline import run_pass, run_pipeline
from hqc.plan import SitePlan
from hqc.program import Program, copy_graph
from hqc.structure import site_problems

PASSES = (
    *(DropSingleKeyAttention(), SelectLayers(rules="reference"), InsertSmoothing(), AttachBranch(rank=2)),
    *(InsertHadamard(tokens=False), InsertQdq((0.0, 9.0)), AttachLora(rank=2), MergeLora(), FreezeIntegers()),
    *(RotateWeights(), SplitDigits(), PackInt4()),
)


STAGES = (InsertQdq, MergeLora, PackInt4)
"""After which the calls of a whole UNet are checked; those of small models are after every pass."""
OF_OTHER_RANGES = [(model, ("asymmetric", "mixed")[turn % 2]) for turn, model in enumerate((*PLAIN, "cross_attention"))]


@pytest.mark.parametrize(("model", "ranges"), [*((model, "symmetric") for model in ZOO), *OF_OTHER_RANGES])
def test_what_the_passes_make_is_right(model: str, ranges: str, captured: Callable[[str], Program]) -> None:
    program = captured(model)
    for one in PASSES:
        activation = "symmetric" if ranges == "symmetric" else "asymmetric"
        one = replace(one, activation=activation, weight=ranges) if isinstance(one, InsertQdq) else one
        program = run_pass(program, one)
        assert site_problems(program) == []
        if model in PLAIN or isinstance(one, STAGES):
            check_calls(program)


@pytest.fixture(scope="session")
def quantised(captured: Callable[[str], Program]) -> Program:
    chain = [SelectLayers(), InsertHadamard(block=8), InsertQdq((0.0, 9.0)), AttachLora(rank=2)]
    return run_pipeline(captured("two_sites"), chain)


PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "linear"}, "the plan says linear; the graph has a conv2d"),
    "channels": ({"in_channels": 64}, "the plan says 64 to 16 channels"),
    "block": ({"block": 16}, "lacks its rotation back in sylvester blocks of 16"),
    "no block": ({"block": 0}, "is rotated back; the plan says nothing of it"),
    "float": ({"weight_bits": None, "activation_bits": None, "lora_rank": 0}, "the plan leaves it float"),
    "weight": ({"weight_bits": 8}, "its weight's codes are not those of 8 bits"),
    "activation": ({"activation_bits": 8}, "its activation's codes are not those of 8 bits"),
    "no LoRA": ({"lora_rank": 0}, "do not agree about its LoRA"),
    "rank": ({"lora_rank": 3}, "its LoRA has another rank than 3"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_does_not_fit_the_graph(case: str, quantised: Program) -> None:
    fields, message = PLANS[case]
    changed: SitePlan = replace(quantised.plan["conv"], **fields)
    problems = site_problems(quantised.evolve(plan=quantised.plan.with_sites({"conv": changed})))
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("name", "meta", "message"),
    [
        ("silu", {"role": "layer", "site": "silu"}, "silu (aten.silu.default) has the role 'layer'"),
        ("silu", {"role": "none"}, "has the role 'none'"),
        ("conv2d", {"site": 5}, "is a layer without a site"),
        ("conv2d", {"site": "head"}, "two layers are called head"),
        ("hadamard_default", {"role": None}, "is not rotated in sylvester blocks of 8 before its quantiser"),
    ],
)
def test_a_role_that_does_not_fit_its_node(name: str, meta: dict[str, Any], message: str, quantised: Program) -> None:
    graph = copy_graph(quantised.graph)
    next(node for node in graph.nodes if node.name == name).meta |= meta
    assert any(message in problem for problem in site_problems(quantised.evolve(graph=graph)))


ROTATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"rotation": "sylvester"}, "lacks its rotation back in sylvester blocks of 16"),
    "weight too": ({"weight_rotated": True}, "is rotated back; the plan says nothing of it"),
    "order": ({"block": 32}, "lacks its rotation back in regular blocks of 32"),
}


@pytest.mark.parametrize("case", ROTATIONS)
def test_a_plan_with_another_rotation_than_the_graph(case: str, captured: Callable[[str], Program]) -> None:
    fields, message = ROTATIONS[case]
    rotated = [SelectLayers(), InsertHadamard(16, kind="regular")]
    for chain in (rotated, [*rotated, InsertQdq((0.0,))], [*rotated, InsertQdq((0.0,)), FreezeIntegers()]):
        program = run_pipeline(captured("two_sites"), chain)
        assert site_problems(program) == []
        changed: SitePlan = replace(program.plan["conv"], **fields)
        problems = site_problems(program.evolve(plan=program.plan.with_sites({"conv": changed})))
        wanted = message if len(chain) > 2 else "do not agree about its rotation"
        assert any(wanted in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("weights", "fields", "message"),
    [
        (True, {"rotation": "sylvester"}, "is rotated by regular H16; the plan says H16"),
        (True, {"weight_rotated": False}, "its codes are rotated otherwise than by regular H16"),
        (True, {"block": 0, "weight_rotated": False}, "is rotated by regular H16; the plan says nothing of it"),
        (False, {"weight_rotated": True}, "its codes are rotated otherwise than by nothing"),
    ],
    ids=str,
)
def test_an_integer_product_with_another_rotation(
    weights: bool, fields: dict[str, Any], message: str, captured: Callable[[str], Program]
) -> None:
    chain = [SelectLayers(), InsertHadamard(16, kind="regular", weights=weights), InsertQdq((0.0,))]
    program = run_pipeline(captured("two_sites"), [*chain, FreezeIntegers(), RotateWeights(), SplitDigits()])
    assert site_problems(program) == []
    changed: SitePlan = replace(program.plan["conv"], **fields)
    problems = site_problems(program.evolve(plan=program.plan.with_sites({"conv": changed})))
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda top: top.index_fill(0, torch.tensor([0]), 31.0), id="more than the mean"),
        pytest.param(lambda top: top.index_fill(0, torch.tensor([0, 1]), 63.0), id="two bits more"),
        pytest.param(lambda top: top - 1, id="no power of two"),
    ],
)
def test_channels_of_other_bits_than_the_plan_says(
    change: Callable[..., Any], captured: Callable[[str], Program]
) -> None:
    ranges = InsertQdq((0.0,), activation="asymmetric", weight="mixed")
    program = run_pipeline(captured("two_sites"), [SelectLayers(bits="w4a4"), ranges])
    top = program.state["conv.weight_top"]
    mixed = top.clone()
    mixed[:4], mixed[4:8] = 31.0, 7.0
    assert site_problems(program.evolve(state={**program.state, "conv.weight_top": mixed})) == []
    problems = site_problems(program.evolve(state={**program.state, "conv.weight_top": change(top)}))
    assert problems == ["site conv: its weight's channels have not 3 to 5 bits, 4 in the mean"]
    plain = replace(program.plan["conv"], weight_mixed=False)
    mixed_state = program.evolve(state={**program.state, "conv.weight_top": mixed})
    problems = site_problems(mixed_state.evolve(plan=program.plan.with_sites({"conv": plain})))
    assert problems == ["site conv: its weight's codes are not those of 4 bits"]


@pytest.mark.parametrize(
    ("salient", "fewer", "message"),
    [
        ([1.0] * 4, 4, None),
        ([1.0] * 4, 3, "its weight's channels have not 3 to 5 bits, 4 in the mean"),
        ([0.5] * 4, 4, "its salient channels are not marked by 1, others by 0"),
    ],
)
def test_binary_codes_of_other_channels_than_the_plan_says(
    salient: list[float], fewer: int, message: str | None, captured: Callable[[str], Program]
) -> None:
    ranges = InsertQdq((0.0,), activation="asymmetric", weight="residual")
    program = run_pipeline(captured("two_sites"), [SelectLayers(bits="w4a4"), ranges])
    top, marked = program.state["conv.weight_top"].clone(), program.state["conv.weight_salient"].clone()
    marked[: len(salient)], top[8 : 8 + fewer] = torch.tensor(salient), 7.0
    changed = program.evolve(state={**program.state, "conv.weight_top": top, "conv.weight_salient": marked})
    assert site_problems(changed) == ([] if message is None else [f"site conv: {message}"])
    plain = replace(program.plan["conv"], weight_residual=False)
    if message is None:
        problems = site_problems(changed.evolve(plan=program.plan.with_sites({"conv": plain})))
        assert problems == ["site conv: its weight's channels have not 3 to 5 bits, 4 in the mean"]


def test_a_site_that_nothing_reads(quantised: Program) -> None:
    graph = copy_graph(quantised.graph)
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (next(node for node in graph.nodes if node.op == "placeholder"),)
    assert site_problems(quantised.evolve(graph=graph)) == ["nothing reads site conv"]


def test_codes_of_an_integer_program_are_those_of_the_plan(captured: Callable[[str], Program]) -> None:
    chain = [SelectLayers(), InsertHadamard(block=8), InsertQdq((0.0, 9.0)), FreezeIntegers(), RotateWeights()]
    program = run_pipeline(captured("two_sites"), chain)
    assert site_problems(program) == []
    graph = copy_graph(program.graph)
    codes = next(node for node in graph.nodes if node.meta.get("role") == "codes")
    codes.args = (*codes.args[:3], 5)
    found = site_problems(program.evolve(graph=graph))
    assert any("its activation's codes are not those of" in problem for problem in found), found
