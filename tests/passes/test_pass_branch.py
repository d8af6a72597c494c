"""A float branch beside a site: what it reads, its rank, weights of its own, what does not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hqc.checking import check_calls
from hqc.errors import PlanError
from hqc.passes import (
    AttachBranch,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    InsertSmoothing,
    RotateWeights,
    SelectLayers,
    SplitDigits,
)
from hqc.pipeline import run_pass, run_pipeline
from hqc.program import Program, copy_graph
from hqc.sites import output_of, source_of
from hqc.storage import load_program, save_program
from hqc.structure import site_problems

Captured = Callable[[str], Program]
AT_HAND = (SelectLayers(), InsertSmoothing(), AttachBranch(rank=3))


def filled(program: Program) -> Program:
    """With branches that are not zero."""
    generator = torch.Generator().manual_seed(4)
    state = dict(program.state)
    for name in [name for name in state if "branch_" in name]:
        state[name] = 0.1 * torch.randn(state[name].shape, generator=generator)
    return program.evolve(state=state)


@pytest.mark.parametrize("name", ["two_sites", "geometry", "shared_weights", "shared_input", "cross_attention"])
def test_it_computes_up_of_down(captured: Captured, name: str) -> None:
    """y + up(down(x)) is the layer with W + up·down, whatever its stride, dilation and padding."""
    program = filled(run_pipeline(captured(name), [SelectLayers(), AttachBranch(rank=3)]))
    state, layers = dict(captured(name).state), dict(captured(name).sites())
    plain = run_pass(captured(name), SelectLayers())
    for plan in program.plan.sites:
        if plan.branch_rank:
            up, down = (program.state[f"{plan.site}.branch_{part}"].flatten(1) for part in ("up", "down"))
            weight = str(layers[plan.site].args[1].target)
            if name == "shared_weights" and "@" in plan.site:
                continue
            state[weight] = state[weight] + (up @ down).view(state[weight].shape)
    if name == "shared_weights":  # one weight of two sites: the same branch for both
        own = {key: program.state[key.replace("@2", "")] if "branch_" in key else t for key, t in program.state.items()}
        program = program.evolve(state=own)
    args = plain.example_inputs(3)
    wanted, found = plain.evolve(state=state).module()(*args), program.module()(*args)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_rank_is_a_quarter_of_the_layer_at_most(captured: Captured) -> None:
    plan = run_pipeline(captured("two_sites"), [SelectLayers(), AttachBranch(rank=32)]).plan
    assert {site.site: site.branch_rank for site in plan.sites} == {"conv": 4, "head": 1}
    plan = run_pipeline(captured("two_sites"), [SelectLayers(), AttachBranch(rank=2)]).plan
    assert {site.site: site.branch_rank for site in plan.sites} == {"conv": 2, "head": 1}
    selected = run_pass(captured("two_sites"), SelectLayers())
    said = "more than 2 layers have a quarter of, which get the most they can: conv 4, head 1"
    assert AttachBranch(rank=32).find(selected).misses == (("rank 32", said),)
    assert AttachBranch(rank=1).find(selected).misses == ()
    with pytest.raises(PlanError, match="needs a rank of at least 1"):
        AttachBranch(rank=0)


def test_misses(captured: Captured) -> None:
    program = run_pass(captured("cross_attention"), SelectLayers(keep_float=("*to_q",)))
    misses = dict(AttachBranch().find(program).misses)
    assert misses["conv_in"] == "8-bit edge layer: left as it is"
    assert all(reason == "float: rule '*to_q': asked for" for site, reason in misses.items() if site.endswith("to_q"))
    again = dict(AttachBranch().find(run_pass(program, AttachBranch())).misses)
    assert set(again.values()) - set(misses.values()) == {"has a branch already"}
    assert all("run select_layers" in reason for _, reason in AttachBranch().find(captured("two_sites")).misses)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_it_reads_what_is_smoothed_and_never_what_is_rotated(captured: Captured, weights: bool, late: bool) -> None:
    rotation = InsertHadamard(weights=weights)
    order = [rotation, AttachBranch(rank=3)] if late else [AttachBranch(rank=3), rotation]
    program = run_pipeline(captured("two_sites"), [SelectLayers(), InsertSmoothing(), *order])
    chain = (InsertQdq((0.0,)), FreezeIntegers(), RotateWeights(), SplitDigits())
    for one in (None, *chain):
        program = run_pass(program, one) if one else program
        assert site_problems(program) == []
        check_calls(program)
        for site, layer in program.sites():
            total = output_of(layer)
            assert total.args[1].args[0].args[0] is source_of(layer, through_smoothing=False), site
            assert source_of(layer, through_smoothing=False).meta["role"] == "smoothing"


def test_it_is_stored_and_loaded(captured: Captured, tmp_path: Path) -> None:
    program = filled(run_pipeline(captured("two_sites"), [*AT_HAND, InsertQdq((0.0, 9.0))]))
    save_program(program, tmp_path / "p.hqc")
    loaded, args = load_program(tmp_path / "p.hqc"), program.example_inputs(2)
    assert loaded.plan == program.plan
    assert torch.equal(loaded.module()(*args), program.module()(*args))


CHANGES = {
    "rank": ({"branch_rank": 2}, "its branch is not of rank 2"),
    "none": ({"branch_rank": 0}, "the plan and the graph do not agree about its branch"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_plan_that_does_not_fit(captured: Captured, case: str) -> None:
    fields, message = CHANGES[case]
    program = run_pipeline(captured("two_sites"), AT_HAND)
    plan = program.plan.with_sites({"conv": replace(program.plan["conv"], **fields)})
    assert any(message in text for text in site_problems(program.evolve(plan=plan)))


def test_a_branch_that_reads_something_else(captured: Captured) -> None:
    program = run_pipeline(captured("two_sites"), AT_HAND)
    graph = copy_graph(program.graph)
    down = next(node for node in graph.nodes if node.meta.get("role") == "branch_down")
    down.replace_input_with(down.args[0], down.args[0].args[0])
    assert any("its branch reads something else" in text for text in site_problems(program.evolve(graph=graph)))
