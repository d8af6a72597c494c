"""Recipes as data: their pipeline text, their plan on a small UNet, and the limits that pydantic keeps."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from hqc.errors import PlanError
from hqc.passes import PASSES
from hqc.pipeline import format_pipeline, parse_pipeline, run_pipeline
from hqc.program import Program, Stage
from hqc.recipes import RECIPES, CalibrationSettings, Recipe, TrainingSettings, find_recipe

TEXTS = {
    "hq-dm": (
        "drop_single_key_attention(), select_layers(), insert_hadamard(), insert_qdq(timesteps=(0.0, 500.0)), "
        "attach_lora(seed=3407)"
    ),
    "hq-dm-reference": (
        "drop_single_key_attention(), select_layers(rules='reference'), insert_hadamard(tokens=False), "
        "insert_qdq(timesteps=(0.0, 500.0)), attach_lora(seed=3407)"
    ),
    "rtn": "drop_single_key_attention(), select_layers(), insert_qdq(timesteps=(0.0, 500.0))",
}


def test_every_recipe_has_its_text_here() -> None:
    assert TEXTS.keys() == RECIPES.keys()
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    assert all(recipe.source for recipe in RECIPES.values())


@pytest.mark.parametrize("name", TEXTS)
def test_pipeline_text(name: str) -> None:
    passes = find_recipe(name).passes("w4a4", (0.0, 500.0))
    assert format_pipeline(passes) == TEXTS[name]
    assert parse_pipeline(TEXTS[name], PASSES) == passes


def test_options_reach_the_passes() -> None:
    recipe = find_recipe("hq-dm").model_copy(
        update={"block": 64, "lora_rank": 8, "rules": "all", "training": TrainingSettings(seed=5)}
    )
    assert format_pipeline(recipe.passes("W3A4", (1.0,), ("conv_in", "to_*"))) == (
        "drop_single_key_attention(), select_layers(bits='W3A4', rules='all', keep_float=('conv_in', 'to_*')), "
        "insert_hadamard(block=64), "
        "insert_qdq(timesteps=(1.0,)), attach_lora(rank=8, seed=5)"
    )


def test_only_the_trained_recipes_train() -> None:
    assert {name: recipe.trains for name, recipe in RECIPES.items()} == {
        "hq-dm": True,
        "hq-dm-reference": True,
        "rtn": False,
    }
    assert all(bool(recipe.lora_rank) == recipe.trains for recipe in RECIPES.values())


# ---- plans on the cross-attention UNet -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(captured: Callable[[str], Program]) -> Callable[[str], Program]:
    return lambda name: run_pipeline(captured("cross_attention"), find_recipe(name).passes("w4a4", (0.0,)))


@pytest.mark.parametrize("name", TEXTS)
def test_edges_are_8_bit_and_unrotated(planned: Callable[[str], Program], name: str) -> None:
    plan = planned(name).plan
    for site in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"):
        assert (plan[site].weight_bits, plan[site].activation_bits, plan[site].block) == (8, 8, 0), site
        assert plan[site].lora_rank == 0
    middle = plan["mid_block.resnets.0.conv1"]
    rotated, trained = (0, 0) if name == "rtn" else (32, 32)
    assert (middle.weight_bits, middle.activation_bits) == (4, 4)
    assert (middle.block, middle.lora_rank) == (rotated, trained)
    assert planned(name).stage == Stage.QUANTISED


def test_shortcuts_and_downsamplers(planned: Callable[[str], Program]) -> None:
    ours, reference = planned("hq-dm").plan, planned("hq-dm-reference").plan
    sites = [plan.site for plan in ours.sites if "shortcut" in plan.site or "downsamplers" in plan.site]
    assert len(sites) >= 2
    for site in sites:
        assert (ours[site].weight_bits, ours[site].block, ours[site].lora_rank) == (8, 32, 0), site
        assert not reference[site].quantised, site
        assert "shortcut or downsampler" in reference[site].reason


def test_tokens_are_rotated_by_hq_dm_and_not_by_the_reference(planned: Callable[[str], Program]) -> None:
    ours, reference = planned("hq-dm").plan, planned("hq-dm-reference").plan
    sites = [plan.site for plan in ours.sites if plan.site.endswith("attn1.to_q")]
    assert sites
    for site in sites:
        assert ours[site].block == 32, site
        assert reference[site].block == 0, site
        assert "left unrotated as in the reference implementation" in reference[site].reason


def test_no_site_is_lost(planned: Callable[[str], Program], captured: Callable[[str], Program]) -> None:
    wanted = [site for site, _ in captured("cross_attention").sites()]
    for name in TEXTS:
        assert [plan.site for plan in planned(name).plan.sites] == wanted


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(PlanError) as caught:
        find_recipe("hqdm")
    assert str(caught.value) == "recipe 'hqdm': unknown; there are hq-dm, hq-dm-reference, rtn. Use one of them."


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TrainingSettings, {"epochs": 0}),
        (TrainingSettings, {"steps": 0}),
        (TrainingSettings, {"batch_size": 0}),
        (TrainingSettings, {"batch_size": 1025}),
        (TrainingSettings, {"num_inference_steps": 0}),
        (TrainingSettings, {"num_inference_steps": 1001}),
        (TrainingSettings, {"guidance_scale": -0.1}),
        (TrainingSettings, {"eta": 1.01}),
        (TrainingSettings, {"lr_lora": 0.0}),
        (TrainingSettings, {"lr_lora": float("nan")}),
        (TrainingSettings, {"lr_lora": float("inf")}),
        (TrainingSettings, {"lr_weight_scale": -1e-5}),
        (TrainingSettings, {"weight_decay": -1.0}),
        (TrainingSettings, {"checkpoint_every": 0}),
        (TrainingSettings, {"seed": -1}),
        (TrainingSettings, {"unknown": 1}),
        (TrainingSettings, {"epochs": 1.5}),
        (CalibrationSettings, {"samples": 0}),
        (CalibrationSettings, {"samples": 4097}),
        (CalibrationSettings, {"candidates": 1}),
        (CalibrationSettings, {"percentile": 99.9}),
        (Recipe, {"name": "x", "source": "y", "block": "many"}),
        (Recipe, {"name": "x", "source": "y", "block": -8}),
        (Recipe, {"name": "x", "source": "y", "lora_rank": -1}),
        (Recipe, {"name": "x"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(map(str, value.items())),
)
def test_limits(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(**options)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        TrainingSettings().epochs = 3  # type: ignore[misc]


def test_total_steps() -> None:
    assert TrainingSettings(epochs=3, num_inference_steps=20).total_steps == 60
    assert TrainingSettings(epochs=3, num_inference_steps=20, steps=7).total_steps == 7


@pytest.mark.parametrize("block", [7, 12, 256])
def test_a_block_that_is_no_hadamard_order_is_refused(block: int) -> None:
    with pytest.raises(PlanError, match=f"block {block}: expected 8, 16, 32, 64 or 128"):
        find_recipe("hq-dm").model_copy(update={"block": block}).passes("w4a4", (0.0,))


def test_unknown_rules_are_refused(captured: Callable[[str], Program]) -> None:
    recipe = find_recipe("rtn").model_copy(update={"rules": "mine"})
    with pytest.raises(PlanError, match="rules 'mine': unknown; there are default, reference, all"):
        run_pipeline(captured("two_sites"), recipe.passes("w4a4", (0.0,)))
