"""Plan files: read, written, followed by recipes; what does not fit the program is refused before anything runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import ok, refused

import hqc
from hqc.calibration.rotations import free_sites
from hqc.errors import PlanError
from hqc.plan import SitePlan
from hqc.program import Program
from hqc.recipes import RECIPES, Recipe, find_recipe
from hqc.recipes.plan_file import PlanFile, plan_of, plan_yaml, read_plan
from hqc.recipes.run import Request, planned, run_settings
from hqc.sampling import synthetic_task
from hqc.site_rules import SiteRule
from hqc.storage import load_program, save_program

Captured = Callable[[str], Program]


def followed(program: Program, recipe: str | Recipe, *rules: SiteRule, bits: str = "w4a4") -> Program:
    """What a recipe plans with these rules."""
    found = find_recipe(recipe) if isinstance(recipe, str) else recipe
    return planned(program, found.following(rules), Request(bits, rules=rules), calibrated=False)


def sites(program: Program) -> list[SitePlan]:
    """What is decided, without the reasons."""
    return [replace(site, reason="") for site in program.plan.sites]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_the_plan_of_a_program_as_a_file_makes_the_same_plan(captured: Captured, recipe: str, tmp_path: Path) -> None:
    program = captured("cross_attention")
    once = followed(program, recipe, SiteRule("*ff*", "w3a5"), SiteRule("*to_v", "float"), bits="w5a6")
    file = tmp_path / "plan.yaml"
    file.write_text(plan_yaml(plan_of(once.plan), ["of a test"]), encoding="utf-8")
    found = read_plan(file)
    again = followed(program, recipe, *found.rules, bits=found.bits)
    assert sites(again) == sites(once)
    assert (again.plan.bits, again.plan.rules) == ("w5a6", found.rules)
    assert plan_yaml(plan_of(again.plan), ["of a test"]) == file.read_text(encoding="utf-8")


def test_rules_decide_bits_rotations_ranks_and_training(captured: Captured) -> None:
    rules = (
        SiteRule("*", "w3a4", lora_rank=2),
        SiteRule("*attn1*", "w8a8", rotation="regular 64"),
        SiteRule("*to_q", rotation=False, lora_rank=0),
        SiteRule("*to_k", trained=False),
        SiteRule("*to_out.0", "float"),
    )
    plan = followed(captured("cross_attention"), "hq-dm", *rules).plan
    by_leaf = {site.site.rpartition("attn1.")[2]: site for site in plan.sites if "attn1." in site.site}
    assert {leaf: site.widths for leaf, site in by_leaf.items()} == {
        **dict.fromkeys(("to_q", "to_k", "to_v"), "w8a8"),
        "to_out.0": "float",
    }
    assert [by_leaf[leaf].rotation_name for leaf in ("to_q", "to_k", "to_v")] == ["", "regular H64", "regular H64"]
    assert [by_leaf[leaf].lora_rank for leaf in ("to_q", "to_k", "to_v")] == [0, 0, 2]
    assert [by_leaf[leaf].trained for leaf in ("to_q", "to_k", "to_v")] == [True, False, True]
    assert by_leaf["to_q"].reason == "unrotated: asked for in the plan"


def test_a_recipe_without_rotation_rotates_what_the_plan_names_only(captured: Captured) -> None:
    plan = followed(captured("two_sites"), "rtn", SiteRule("conv", rotation="sylvester 8")).plan
    assert [site.block for site in plan.sites] == [8, 0]


def test_a_chosen_rotation_needs_no_samples_where_the_plan_says_all(captured: Captured) -> None:
    program = captured("two_sites")
    assert len(free_sites(followed(program, "hqc"))) == 2
    fixed = followed(program, "hqc", SiteRule("*", rotation="sylvester 8"), SiteRule("head", rotation=False))
    assert [site.block for site in fixed.plan.sites] == [8, 0]


def test_a_rotation_is_chosen_where_the_plan_leaves_it(captured: Captured) -> None:
    program, few = captured("cross_attention"), {"sampler.num_inference_steps": 2, "calibrate_activations.samples": 1}
    rtn = find_recipe("rtn").rotated(find_recipe("hqc").step("choose_rotation"))
    plan = PlanFile((SiteRule("*", rotation="sylvester 16"), SiteRule("*to_q", rotation=True)))
    settings = {**few, "choose_rotation.samples": 1, "choose_rotation.timesteps": 1}
    made = hqc.quantise(program, rtn, task=synthetic_task(program), plan=plan, settings=settings).plan
    assert {"output error" in site.reason for site in made.quantised if site.site.endswith("to_q")} == {True}
    assert {site.block for site in made.quantised if not site.site.endswith("to_q")} <= {8, 16, 0}
    assert not any("output error" in site.reason for site in made.sites if not site.site.endswith("to_q"))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            SiteRule("nothing", "w4a4", where="plan p.yaml, rule 1"),
            "pattern 'nothing' matches no site. Sites are named",
        ),
        (
            SiteRule("*", rotation=True, where="plan p.yaml, rule 1"),
            "rotation is true, and recipe 'rtn' does not rotate",
        ),
        (SiteRule("*", lora_rank=4, where="plan p.yaml, rule 1"), "lora_rank is 4, and recipe 'rtn' attaches no LoRA"),
    ],
)
def test_what_does_not_fit_recipe_or_program_is_refused(captured: Captured, rule: SiteRule, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        hqc.ptq(captured("two_sites"), "rtn", plan=PlanFile((rule,)), task=synthetic_task(captured("two_sites")))
    assert caught.value.line.startswith(f"plan p.yaml, rule 1: {said}")


def test_a_rank_that_exceeds_a_layer_is_refused_before_anything_runs(captured: Captured) -> None:
    program = captured("two_sites")
    rule = SiteRule("head", lora_rank=64, where="plan p.yaml, rule 1")
    with pytest.raises(
        PlanError, match=r"lora_rank 64 exceeds the layer head, whose weight is \[5, 16\]\. Give at most 5"
    ):
        hqc.qat(program, "hq-dm", plan=PlanFile((rule,)), task=synthetic_task(program), forward_loop=_never)


def _never(unet: object) -> None:
    raise AssertionError("calibration has begun")


def test_a_site_that_a_pass_has_removed_is_named(captured: Captured) -> None:
    program = captured("single_key")
    removed = [
        site for record in planned(program, find_recipe("rtn"), Request("w4a4")).history for site in record.removed
    ]
    assert removed
    with pytest.raises(PlanError, match="matches no site that is left: drop_single_key_attention removed"):
        followed(program, "rtn", SiteRule(removed[0], "w8a8"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "is no mapping"),
        ("rules: {}", "rules is no list"),
        ("rules: []", "rules is no list"),
        ("rule: []", "has no field 'rule'; there are bits, rules"),
        ("{rules: [{pattern: a, bits: w4a4}], bits: 4}", "bits is '4'; expected wNaM"),
        ("{rules: [{pattern: a, bits: w4a4}], bits: w9a4}", "bits 'w9a4': expected wNaM"),
        ("rules:\n- {pattern: a, bits: w4a4}\n- {pattern: a, bit: 4}", "rule 2: has no field 'bit'"),
        ("rules:\n- &a {pattern: a, bits: w4a4}\n- *a", "line 3: is no YAML (an alias is not taken)"),
        ("rules: [", "line 1: is no YAML"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        read_plan(tmp_path / "p.yaml")
    assert caught.value.line.startswith(f"plan {tmp_path}/p.yaml")
    assert said in caught.value.line


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path / "none.yaml")


def test_bits_of_a_plan_and_those_asked_for() -> None:
    plan = PlanFile((SiteRule("a", "w2a2"),), "W3A4", "plan p.yaml")
    assert (plan.bits_with(None), plan.bits_with("w3a4"), PlanFile(()).bits_with(None)) == ("w3a4", "w3a4", "w4a4")
    with pytest.raises(PlanError, match=r"plan p\.yaml: says bits w3a4, and w4a4 is asked for"):
        plan.bits_with("w4a4")


def test_the_command_line(captured: Captured, tmp_path: Path) -> None:
    program, plan = tmp_path / "p.hqc", tmp_path / "plan.yaml"
    save_program(captured("cross_attention"), program)
    plan.write_text("bits: w5a5\nrules:\n- {pattern: conv_in, bits: w3a6}\n", encoding="utf-8")
    quick = ("--synthetic", "--calib-size", "1", "--n-steps", "2")
    ok("ptq", program, "-o", tmp_path / "q.hqc", "--plan", plan, *quick)
    made = load_program(tmp_path / "q.hqc").plan
    assert (made.bits, made["conv_in"].widths, made["conv_out"].widths) == ("w5a5", "w3a6", "w8a8")
    written = ok("explain", tmp_path / "q.hqc", "--yaml").stdout
    assert "\n- {pattern: conv_in, bits: w3a6, rotation: false, trained: false}\n" in written
    plan.write_text(written, encoding="utf-8")
    ok("ptq", program, "-o", tmp_path / "again.hqc", "--plan", plan, *quick)
    first, second = (load_program(tmp_path / f"{name}.hqc") for name in ("q", "again"))
    assert sites(first) == sites(second)
    assert (
        ok("explain", program, "--recipe", "rtn", "--plan", plan, "--yaml").stdout.splitlines()[1:]
        == written.splitlines()[1:]
    )
    assert "conv_in: bits w3a6" in ok("explain", program, "--recipe", "rtn", "--plan", plan).stdout
    said = refused(tmp_path, "ptq", program, "-o", tmp_path / "x.hqc", "--plan", plan, "--bits", "w4a4", *quick)
    assert said.startswith(f"plan {plan}: says bits w5a5, and w4a4 is asked for")


def test_a_run_with_another_plan_is_not_resumed(captured: Captured, tmp_path: Path) -> None:
    program, request = captured("two_sites"), Request("w4a4")
    plain = run_settings(program, find_recipe("rtn"), request, "noise")
    ruled = run_settings(program, find_recipe("rtn"), replace(request, rules=(SiteRule("head", "w8a8"),)), "noise")
    assert {**plain, "plan": [{"pattern": "head", "bits": "w8a8"}]} == ruled
