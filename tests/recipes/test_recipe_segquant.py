"""SegQuant's two steps in every recipe: the plan of each, and two from calibration or training to an export."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_pipeline import traced_pipeline

import hqc
from hqc import api
from hqc.passes import SplitConcat, SplitSigns
from hqc.program import Program, Stage
from hqc.recipes import RECIPES, Recipe
from hqc.recipes.run import Request, planned
from hqc.site_names import whole_site
from hqc.steps import step_name

FEW: dict[str, dict[str, Any]] = {
    "smooth": {"samples": 1, "timesteps": 1, "rows": 8, "candidates": 2},
    "calibrate_activations": {"samples": 1, "candidates": 8},
    "decompose": {"samples": 1, "timesteps": 1, "rows": 8, "rounds": 2},
    "distil": {"updates": 2, "batch_size": 2},
    "attach_lora": {"rank": 2},
}


def with_both(name: str) -> Recipe:
    """A recipe with both steps in front of its selection, in the place of a split that it has."""
    recipe = RECIPES[name]
    steps = [step for step in recipe.steps if not isinstance(step, SplitConcat | SplitSigns)]
    first = next(i for i, step in enumerate(steps) if step_name(type(step)) == "select_layers")
    return replace(recipe, steps=(*steps[:first], SplitConcat(), SplitSigns(), *steps[first:]))


def test_it_is_rtn_with_both() -> None:
    assert with_both("rtn").steps == with_both("segquant").steps == RECIPES["segquant"].steps


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_plans_with_both(captured: Callable[[str], Program], name: str) -> None:
    """Each part of a concatenation and each sign is a site of its own, with the bits of the whole one."""
    program = captured("cross_attention")
    result = planned(program, with_both(name), Request("w4a4"), calibrated=False)
    sites = {plan.site: plan for plan in result.plan.sites}
    assert result.stage == Stage.QUANTISED
    shortcut, behind = "up_blocks.0.resnets.0.conv_shortcut", "mid_block.resnets.0.conv1"
    for whole in (shortcut, behind):
        assert whole not in sites
        first, second = sites[f"{whole}:0"], sites[f"{whole}:1"]
        assert (first.weight_bits, first.activation_bits) == (second.weight_bits, second.activation_bits)
    assert sites[f"{behind}:0"].weight_bits == 4  # activations of ganq stay float
    assert {whole_site(site) for site in sites} == {site for site, _ in program.sites()} - _dropped(result)


def _dropped(program: Program) -> set[str]:
    return {site for record in program.history for site in record.removed}


@pytest.mark.parametrize("name", ["svdquant", "efficientdm"])
def test_two_recipes_with_both_end_to_end(name: str, tmp_path: Path) -> None:
    """Calibrated or trained, and exported: every part is verified as an integer product."""
    recipe = with_both(name).set("sampler.num_inference_steps", 2)
    for step, options in FEW.items():
        recipe = recipe.having(step, **options) if recipe.step(step) is not None else recipe
    program = traced_pipeline("classes")
    result = api.quantise(program, recipe, "w4a4")
    parts = [plan for plan in result.plan.quantised if ":" in plan.site]
    assert len(parts) > 10
    for whole in ("down_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.1.conv1"):  # SiLU: little is below zero
        above, below = (result.state[f"{whole}:{sign}.activation_scale_table"] for sign in (0, 1))
        assert bool((below < 0.5 * above).all())
    hqc.export_program(result, "onnxruntime", tmp_path / "x")  # verifies every site and the whole network
    session, args = hqc.load(tmp_path / "x").session, result.example_inputs(3, seed=4)
    wanted = result.module()(*args)
    assert min(float((x - y).norm() / y.norm()) for x, y in zip(session(*args), wanted, strict=True)) < 1e-4
