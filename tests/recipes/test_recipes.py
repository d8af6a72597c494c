"""Recipes as data: text, YAML and schema, the order of their steps, their plan on a small UNet, what they refuse."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.calibration import CalibrateActivations, CalibrateWeights, ChooseRotation, Decompose, FitLookup, Smooth
from hqc.errors import PassError, PipelineTextError, PlanError
from hqc.passes import (
    AttachBranch,
    AttachLora,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    InsertSmoothing,
    SelectLayers,
)
from hqc.program import Program, Stage
from hqc.recipes import RECIPES, Recipe, find_recipe
from hqc.recipes.files import option_value, read_recipe, recipe_schema, recipe_yaml
from hqc.recipes.known import PARTS, STEPS
from hqc.recipes.run import Request, run_recipe
from hqc.recipes.run import planned as planned_by
from hqc.sampling import Sampler, Work, synthetic_task
from hqc.steps import parse_steps, step_name
from hqc.training import Distil, Group, GuidedNoise

HQ_DM_TEXT = (
    "drop_single_key_attention(), select_layers(), insert_hadamard(), insert_qdq(), calibrate_weights(), "
    "calibrate_activations(), attach_lora(seed=3407), distil(groups=("
    "group(pattern='*.lora_?', rate=0.03, relative='weight_scale', decay=0.01), "
    "group(pattern='*.weight_scale', rate=1e-05, positive=True), "
    "group(pattern='*.activation_scale_table', rate=0.001, positive=True)))"
)
TEXTS = {
    "hq-dm": HQ_DM_TEXT,
    "hq-dm-reference": HQ_DM_TEXT.replace("select_layers()", "select_layers(rules='reference')").replace(
        "insert_hadamard()", "insert_hadamard(tokens=False)"
    ),
    "rtn": "drop_single_key_attention(), select_layers(), insert_qdq(), calibrate_weights(), calibrate_activations()",
}
relaxed = settings(deadline=None, derandomize=True, max_examples=100)
PTQ = (SelectLayers(), InsertQdq(), CalibrateWeights(), CalibrateActivations())


def test_every_recipe_has_a_name_a_source_and_a_docstring() -> None:
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    assert all(recipe.source and len(recipe.doc) > 100 for recipe in RECIPES.values())


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.text == TEXTS[name]
    assert parse_steps(TEXTS[name], STEPS, PARTS) == recipe.steps


def test_kinds() -> None:
    assert {name: RECIPES[name].kind for name in TEXTS} == {"hq-dm": "qat", "hq-dm-reference": "qat", "rtn": "ptq"}
    assert find_recipe("hq-dm").untrained().kind == "ptq"


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    recipe = replace(find_recipe(name), sampler=Sampler(7, 2.0, 0.5))
    (tmp_path / "mine.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
    found = find_recipe(str(tmp_path / "mine.yaml"))
    assert (found.name, found.source, found.steps, found.sampler) == (name, recipe.source, recipe.steps, recipe.sampler)


@pytest.fixture(scope="module")
def by_schema() -> Any:
    """A validator of the schema, which is one itself."""
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    return jsonschema.Draft202012Validator(recipe_schema())


@pytest.mark.parametrize("name", RECIPES)
def test_the_schema_takes_what_is_written(name: str, by_schema: Any) -> None:
    by_schema.validate(yaml.safe_load(recipe_yaml(find_recipe(name))))


@pytest.mark.parametrize(
    "steps",
    [
        [{"select_layer": {}}],
        [{"select_layers": {"bits": 4}}],
        [{"insert_qdq": {"size": 1}}],
        [],
        [{"distil": {}, "a": 1}],
    ],
    ids=json.dumps,
)
def test_the_schema_refuses(steps: Any, by_schema: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        by_schema.validate({"name": "x", "steps": steps})


BAD_FILES = {
    "": "is no mapping",
    "- a": "is no mapping",
    "name: x": "lacks 'steps'",
    "steps: [insert_qdq]": "lacks 'name'",
    "name: x\nsteps: insert_qdq": "steps is no list",
    "name: x\nsteps: []": "steps is no list",
    "name: 3\nsteps: [insert_qdq]": "name is 3; expected a text",
    "name: x\nblock: 3\nsteps: [insert_qdq]": "has no field 'block'",
    "name: x\nsteps: [insert_qqd]": "unknown step 'insert_qqd'; there are drop_single_key_attention, ",
    "name: x\nsteps: [guided_noise]": "unknown step 'guided_noise'",
    "name: x\nsteps: [{insert_hadamard: {block: '32'}}]": "option block is a str; expected int",
    "name: x\nsteps: [{insert_hadamard: {size: 32}}]": "has no option 'size'; it has block",
    "name: x\nsteps: [{insert_hadamard: {block: 33}}]": "block 33",
    "name: x\nsteps: [{insert_hadamard: 32}]": "its options are 32",
    "name: x\nsteps: [{insert_hadamard: {}, insert_qdq: {}}]": "is not `name: {option: value}`",
    "name: x\nsteps: [[insert_qdq]]": "is not `name: {option: value}`",
    "name: x\nsteps: [{distil: {losses: [{noise: {}}]}}]": "unknown step 'noise'; there are group, both_halves, gui",
    "name: x\nsteps: [{distil: {losses: [3]}}]": "option losses is (3,)",
    "name: x\nsteps: [{distil: {epochs: 0}}]": "option epochs is 0: Input should be greater than or equal to 1",
    "name: x\nsteps: [{distil: {groups: [{group: {rate: 1.0}}]}}]": "lacks its option pattern",
    "name: x\nsampler: 3\nsteps: [insert_qdq]": "sampler: is no mapping",
    "name: x\nsampler: {steps: 3}\nsteps: [insert_qdq]": "has no option 'steps'; it has num_inference_steps",
    "name: x\nsampler: {eta: 2}\nsteps: [insert_qdq]": "option eta is 2",
    "name: &a x\nsource: *a\nsteps: [insert_qdq]": "line 2: is no YAML (an alias is not taken)",
    "name: x\nname: y\nsteps: [insert_qdq]": "line 1: is no YAML ('name' stands there twice)",
    "name: [": "is no YAML",
    "name: !!python/object/apply:os.system ['true']\nsteps: [insert_qdq]": "is no YAML",
    "name: x\nsteps: [insert_qdq]": "takes",
    "a: \0": "is no YAML",
    "[" * 3000: "is no YAML",
}


@pytest.mark.parametrize("text", BAD_FILES, ids=lambda text: text[:50])
def test_bad_files_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises((PlanError, PipelineTextError)) as caught:
        read_recipe(path)
    if text != "name: x\nsteps: [insert_qdq]":
        assert BAD_FILES[text] in str(caught.value)
    assert "\n" not in caught.value.line


@relaxed
@given(st.text(max_size=80))
def test_any_text_gives_a_value_or_the_one_error(text: str) -> None:
    with contextlib.suppress(PlanError, PipelineTextError):  # any other error fails the test
        option_value(text, "--set x")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(PlanError, match="cannot be read"):
        find_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(PlanError, match="cannot be read"):
        find_recipe(f"{tmp_path}/")


# ---- changing one ----------------------------------------------------------------------------------------------------


def test_options_are_set_by_path() -> None:
    recipe = find_recipe("hq-dm").set("distil.epochs", 10).set("sampler.eta", 1)
    assert recipe.step("distil").epochs == 10
    assert recipe.sampler.eta == 1.0
    assert find_recipe("hq-dm").step("distil").epochs == 30
    groups = option_value("[{group: {pattern: '*.lora_?', rate: 1}}]", "--set")
    assert recipe.set("distil.groups", groups).step("distil").groups == (Group("*.lora_?", 1.0),)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("distill.epochs", 3, "recipe 'hq-dm' has no step 'distill'; it has drop_single_key_attention, select_layers"),
        ("distil.epoch", 3, "distil has no option 'epoch'; it has losses, groups, epochs"),
        ("distil.epochs", "ten", "option epochs is a str; expected int"),
        ("distil.epochs", -1, "option epochs is -1"),
        ("sampler.steps", 1, "sampler has no option 'steps'"),
        ("insert_hadamard.block", 7, "block 7"),
    ],
)
def test_a_path_that_is_not_there_lists_what_is(path: str, value: Any, said: str) -> None:
    with pytest.raises((PlanError, PipelineTextError)) as caught:
        find_recipe("hq-dm").set(path, value)
    assert said in str(caught.value)


def test_rates_are_those_of_the_deciding_group() -> None:
    changed = find_recipe("hq-dm").with_rate("lora_a", 0.5).step("distil").groups
    assert [group.rate for group in changed] == [0.5, 1e-5, 1e-3]
    with pytest.raises(PlanError, match="recipe 'rtn': has no group that trains lora_a"):
        find_recipe("rtn").with_rate("lora_a", 0.5)


def test_a_rotation_goes_where_it_belongs() -> None:
    rotated = find_recipe("rtn").rotated(InsertHadamard(16))
    assert "select_layers(), insert_hadamard(block=16), insert_qdq()" in rotated.text
    assert rotated.rotates
    assert rotated.unrotated() == find_recipe("rtn")
    assert find_recipe("hq-dm").rotated(InsertHadamard(64)).text == HQ_DM_TEXT.replace(
        "insert_hadamard()", "insert_hadamard(block=64)"
    )


# ---- the order -------------------------------------------------------------------------------------------------------

ORDERS = {
    "before select_layers": ((InsertQdq(), *PTQ), "comes before select_layers, which it needs"),
    "rotation first": ((InsertHadamard(), *PTQ), "comes before select_layers, which it needs"),
    "rotation last": ((*PTQ, InsertHadamard()), "takes a program that is captured; here it is quantised"),
    "calibrated before": ((CalibrateWeights(), *PTQ), "takes a program that is quantised; here it is captured"),
    "not calibrated": (PTQ[:3], "leaves scales that no calibrate_activations fills"),
    "twice": ((SelectLayers(), *PTQ), "is there twice"),
    "lora first": ((AttachLora(), *PTQ), "takes a program that is quantised; here it is captured"),
    "nothing quantised": ((SelectLayers(),), "leaves the program captured"),
    "no tables": ((*PTQ[:1], InsertQdq(weight="lookup"), *PTQ[2:]), "leaves tables that no fit_lookup fills"),
    "tables trained": (
        (*PTQ[:1], InsertQdq(weight="lookup"), FitLookup(), *PTQ[3:], Distil(groups=(Group("*.weight", rate=1.0),))),
        "would train weights out of the tables of fit_lookup",
    ),
    "frozen": ((*PTQ, FreezeIntegers()), "leaves the program integer"),
    "smoothing first": ((InsertSmoothing(), Smooth(), *PTQ), "comes before select_layers, which it needs"),
    "nothing to smooth": ((*PTQ[:1], Smooth(), *PTQ[1:]), "comes before insert_smoothing, which it needs"),
    "not smoothed": ((*PTQ[:1], InsertSmoothing(), *PTQ[1:]), "leaves factors that no smooth fills"),
    "smoothed twice": ((*PTQ[:1], InsertSmoothing(), InsertSmoothing(), Smooth(), *PTQ[1:]), "is there twice"),
    "branch first": ((AttachBranch(), *PTQ[:2], Decompose(), *PTQ[2:]), "comes before select_layers, which it needs"),
    "no branch": ((*PTQ[:2], Decompose(), *PTQ[2:]), "comes before attach_branch, which it needs"),
    "empty branch": ((*PTQ[:1], AttachBranch(), *PTQ[1:]), "leaves branches that no decompose fills"),
    "smoothed behind its branch": (
        (*PTQ[:1], AttachBranch(), InsertSmoothing(), Smooth(), PTQ[1], Decompose(), *PTQ[2:]),
        "comes behind attach_branch, which reads what it changes",
    ),
    "rotated before": (
        (*PTQ[:1], InsertHadamard(), InsertSmoothing(), Smooth(), *PTQ[1:]),
        "comes behind insert_hadamard, which reads what it changes",
    ),
    "rotated between": (
        (*PTQ[:1], InsertSmoothing(), ChooseRotation(), Smooth(), *PTQ[1:]),
        "comes behind choose_rotation, which reads what it changes",
    ),
}


@pytest.mark.parametrize("steps", ORDERS)
def test_an_impossible_order_is_said_before_anything_runs(steps: str) -> None:
    chain, said = ORDERS[steps]
    with pytest.raises(PlanError) as caught:
        Recipe("mine", "", chain)
    assert said in str(caught.value)
    assert caught.value.where.startswith("recipe 'mine'")


def test_mixed_bits_are_chosen_where_there_are_some() -> None:
    recipe = find_recipe("mpq-dm")
    with pytest.raises(PlanError, match=r"mix_channel_bits\(samples=32\): finds no mixed weights. Give insert_qdq"):
        recipe.having("insert_qdq", weight="asymmetric")
    steps = [step for step in recipe.steps if step_name(type(step)) != "insert_qdq"]
    with pytest.raises(PlanError, match="takes a program that is quantised"):
        replace(recipe, steps=tuple(steps))


def test_salient_channels_and_where_a_lora_starts_need_their_steps() -> None:
    recipe = find_recipe("mpq-dmv2")
    with pytest.raises(PlanError, match=r"salient channels no mix_channel_bits chooses\. Put it behind"):
        recipe.without("mix_channel_bits")
    with pytest.raises(PlanError, match="comes before attach_lora, which it needs"):
        recipe.without("attach_lora")
    assert not {"attach_lora", "init_lora"} & {step_name(type(step)) for step in recipe.untrained().steps}


def test_a_table_needs_few_bits(captured: Callable[[str], Program]) -> None:
    """At 8 bits there is no weight with a table, and the step says so."""
    program = captured("cross_attention")
    recipe = find_recipe("ganq-int8")
    plan = planned_by(program, recipe, Request("w4a8")).plan
    assert {p.weight_lookup for p in plan.quantised} == {True, False}
    assert any(p.widths == "w4~a8" for p in plan.quantised)
    with pytest.raises(PlanError, match=r"fit_lookup: no weight has a table; the plan is w8a8. Ask for w2 … w4"):
        run_recipe(program, recipe, Request("w8a8"), Work(program, synthetic_task(program), Sampler(2, 1.0, 0.0)))


def test_training_without_losses_or_groups_is_refused() -> None:
    with pytest.raises(PlanError, match="has no losses or no groups"):
        Distil()
    with pytest.raises(PlanError, match="has no losses or no groups"):
        Distil(losses=(), groups=(Group("*", 1.0),))
    with pytest.raises(PipelineTextError, match="option weight is 0"):
        GuidedNoise(weight=0)


# ---- plans on the cross-attention UNet -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(captured: Callable[[str], Program]) -> Callable[[str], Program]:
    return cache(lambda name: planned_by(captured("cross_attention"), find_recipe(name), Request("w4a4")))


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
    assert all(name in str(caught.value) for name in RECIPES)


def test_a_quantised_program_is_refused(captured: Callable[[str], Program]) -> None:
    program = planned_by(captured("two_sites"), find_recipe("rtn"), Request("w4a4"))
    assert program.stage == Stage.QUANTISED
    with pytest.raises(PassError, match="takes a program that is captured; this one is quantised"):
        planned_by(program, find_recipe("rtn"), Request("w4a4"))


@pytest.mark.parametrize("block", [7, 12])
def test_a_block_that_is_no_hadamard_order_is_refused(block: int) -> None:
    with pytest.raises(PlanError, match=f"block {block}"):
        find_recipe("hq-dm").set("insert_hadamard.block", block)


def test_unknown_rules_are_refused(captured: Callable[[str], Program]) -> None:
    recipe = find_recipe("rtn").set("select_layers.rules", "mine")
    with pytest.raises(PlanError, match="rules 'mine': unknown; there are default, reference, mixed, all"):
        planned_by(captured("two_sites"), recipe, Request("w4a4"))
