"""Smoothing in the graph: own factors and weights at every site, in front of rotations and quantisers."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hqc.errors import PassError, PipelineTextError
from hqc.passes import FreezeIntegers, InsertHadamard, InsertQdq, InsertSmoothing, RotateWeights, SelectLayers
from hqc.pipeline import run_pass, run_pipeline
from hqc.program import Program
from hqc.recipes import find_recipe
from hqc.recipes.run import Request, begin
from hqc.site_rules import SiteRule
from hqc.sites import quantised_sites, source_of
from hqc.structure import site_problems
from hqc.verify import verify

Captured = Callable[[str], Program]


def test_every_site_has_its_own(captured: Captured) -> None:
    """Also where sites share a weight, or read one tensor."""
    shared = run_pipeline(captured("shared_weights"), [SelectLayers(), InsertSmoothing()])
    names = {name for name in shared.state if name.endswith(".weight_smoothed")}
    assert names == {f"{site}.weight_smoothed" for site in ("conv", "conv@2", "linear", "linear@2")}
    reading = run_pipeline(captured("shared_input"), [SelectLayers(), InsertSmoothing()])
    sources = {source_of(layer) for _, layer in reading.sites()}
    assert len(sources) == 1
    assert len({layer.args[0] for _, layer in reading.sites()}) == 3


def test_misses(captured: Captured) -> None:
    program = run_pass(captured("cross_attention"), SelectLayers(keep_float=("*to_q",)))
    misses = dict(InsertSmoothing().find(program).misses)
    assert misses["conv_in"] == "8-bit edge layer: left as it is"
    assert all(reason == "float: rule '*to_q': asked for" for site, reason in misses.items() if site.endswith("to_q"))
    again = dict(InsertSmoothing().find(run_pass(program, InsertSmoothing())).misses)
    assert set(again.values()) - set(misses.values()) == {"is smoothed already"}
    rotated = run_pipeline(captured("two_sites"), [SelectLayers(), InsertHadamard()])
    wanted = "is rotated already: run insert_smoothing before insert_hadamard"
    assert dict(InsertSmoothing().find(rotated).misses)["conv"] == wanted


def test_sites_of_more_bits_and_sites_that_are_not_trained(captured: Captured) -> None:
    """`most_bits` leaves wide activations alone; whether a site is trained does not matter to a factor."""
    begun = begin(captured("two_sites"), find_recipe("rtn"), Request("w4a6", rules=(SiteRule("conv", trained=False),)))
    program = run_pass(begun, SelectLayers())
    assert not program.plan["conv"].trained
    assert set(InsertSmoothing().find(program).matches) == {"conv", "head"}
    misses = dict(InsertSmoothing(most_bits=5).find(program).misses)
    assert misses == dict.fromkeys(("conv", "head"), "its activations have 6 bits, more than 5")
    assert set(InsertSmoothing(most_bits=6).find(program).matches) == {"conv", "head"}
    with pytest.raises(PipelineTextError, match="most_bits is 9"):
        InsertSmoothing(most_bits=9)


@pytest.mark.parametrize("weights", [False, True])
def test_a_rotation_turns_what_is_smoothed(captured: Captured, weights: bool) -> None:
    """x·λ⁻¹ is rotated, and λ·W: the factors are filled before."""
    program = run_pipeline(captured("two_sites"), [SelectLayers(), InsertSmoothing()])
    state, factors = dict(program.state), 0.5 + torch.rand(32, generator=torch.Generator().manual_seed(1))
    state["conv.smoothing"] = factors.reciprocal().view(32, 1, 1)
    state["conv.weight_smoothed"] = state["conv.weight_smoothed"] * factors.view(1, 32, 1, 1)
    smooth = program.evolve(state=state)
    rotated = run_pass(smooth, InsertHadamard(weights=weights))
    args = captured("two_sites").example_inputs(3)
    # Float rounding of the factors and of a rotation and its inverse.
    torch.testing.assert_close(rotated.module()(*args), captured("two_sites").module()(*args), rtol=1e-4, atol=1e-5)
    integer = run_pipeline(rotated, [InsertQdq((0.0,)), FreezeIntegers(), RotateWeights()])
    assert site_problems(integer) == []
    site = next(quantised_sites(integer))
    assert site.x.meta["role"] == "smoothing"
    assert source_of(site.layer).name == site.x.args[0].name


def test_what_does_not_fit_is_found(captured: Captured) -> None:
    program = run_pipeline(captured("two_sites"), [SelectLayers(), InsertSmoothing(), InsertQdq((0.0,))])
    plan = program.plan.with_sites({"conv": replace(program.plan["conv"], smoothed=False)})
    assert any("do not agree about its smoothing" in text for text in site_problems(program.evolve(plan=plan)))
    wrong = program.evolve(state={**program.state, "conv.smoothing": torch.ones(32)})
    assert any("its smoothing is (32,); expected (32, 1, 1)" in text for text in site_problems(wrong))
    zero = program.evolve(state={**program.state, "conv.smoothing": torch.zeros(32, 1, 1)})
    with pytest.raises(PassError, match=r"conv.smoothing has a factor that is not positive and finite"):
        verify(zero)


def test_a_shift_is_taken_back_by_the_bias(captured: Captured) -> None:
    """By the layer's own bias, a copy of it where sites share one; padded convolutions have none."""
    program = run_pipeline(captured("cross_attention"), [SelectLayers(), InsertSmoothing(shift=True)])
    shifted = [plan for plan in program.plan.sites if plan.shifted]
    pointwise = {plan.site for plan in shifted if plan.kind == "conv2d"}
    assert {site.rpartition(".")[2] for site in pointwise} == {"proj_in", "proj_out"}
    assert any(plan.smoothed and not plan.shifted for plan in program.plan.sites)
    generator, state = torch.Generator().manual_seed(3), dict(program.state)
    for plan in shifted:
        shift = torch.randn(plan.in_channels, generator=generator)
        state[f"{plan.site}.shift"] = shift.view(state[f"{plan.site}.shift"].shape)
        moved = state[f"{plan.site}.weight_smoothed"].flatten(1).mv(shift)
        state[f"{plan.site}.bias_shifted"] = state[f"{plan.site}.bias_shifted"] + moved
    args = program.example_inputs(2, seed=5)
    moved_program = program.evolve(state=state)
    torch.testing.assert_close(moved_program.module()(*args), program.module()(*args), rtol=1e-3, atol=1e-4)
    layer = dict(program.sites())[shifted[0].site]
    assert source_of(layer).meta.get("role") is None


def test_a_shift_in_every_integer_form(captured: Captured) -> None:
    program = run_pipeline(captured("cross_attention"), [SelectLayers(rules="all"), InsertSmoothing(shift=True)])
    integer = run_pipeline(program, [InsertQdq((0.0,)), FreezeIntegers(), RotateWeights()])
    assert site_problems(integer) == []
    first = next(plan.site for plan in program.plan.sites if plan.shifted)
    hidden = integer.plan.with_sites({first: replace(integer.plan[first], shifted=False)})
    assert any("do not agree about its shift" in text for text in site_problems(integer.evolve(plan=hidden)))
    wrong = integer.evolve(state={**integer.state, f"{first}.shift": torch.zeros(1)})
    assert any("its shift is (1,); expected" in text for text in site_problems(wrong))
