"""Rules of plan files: what they say of a site, which of them decides, what they refuse."""

from typing import Any

import pytest

from hqc.bits import Bits
from hqc.errors import PlanError
from hqc.plan import QuantPlan, Rule
from hqc.site_rules import SiteRule, changed, deciding, rule_from_data, rule_to_data

RULES = (
    SiteRule("*", "w4a4", rotation="sylvester 32"),
    SiteRule("up.*", "w8a8", why="sensitive"),
    SiteRule("up.q", lora_rank=0, trained=False),
    SiteRule("*.q", rotation=False),
)


def test_each_field_is_decided_by_the_last_rule_that_says_it() -> None:
    found = {what: deciding(RULES, "up.q", what) for what in ("bits", "rotation", "lora_rank", "trained")}  # type: ignore[arg-type]
    assert found == {"bits": RULES[1], "rotation": RULES[3], "lora_rank": RULES[2], "trained": RULES[2]}
    assert deciding(RULES, "down.q", "bits") == RULES[0]
    assert deciding(RULES, "up.q:1", "trained") == RULES[2], "a part of a split site"
    assert deciding(RULES, "UP.q", "trained") is None, "case matters"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ((), Rule("*", "base", bits=Bits(8, 8), rotate=False, trained=False)),
        ((SiteRule("*", "w3a4"),), Rule("*", "base", bits=Bits(3, 4), rotate=False, trained=False)),
        ((SiteRule("*", "float", why="mine"),), Rule("*", "mine", float_=True)),
        (
            (SiteRule("*", "float"), SiteRule("a", "w2a2")),
            Rule("*", "base", bits=Bits(2, 2), rotate=False, trained=False),
        ),
        ((SiteRule("*", rotation=True),), Rule("*", "base", bits=Bits(8, 8), trained=False)),
        ((SiteRule("*", rotation="regular 16"),), Rule("*", "base", bits=Bits(8, 8), trained=False)),
        ((SiteRule("b", "w2a2"),), Rule("*", "base", bits=Bits(8, 8), rotate=False, trained=False)),
    ],
)
def test_what_the_recipe_says_is_changed(rules: tuple[SiteRule, ...], expected: Rule) -> None:
    assert changed(Rule("*", "base", bits=Bits(8, 8), rotate=False, trained=False), rules, "a") == expected


def test_a_site_that_the_recipe_leaves_float_gets_bits() -> None:
    found = changed(Rule("*", "shortcut", float_=True), (SiteRule("a", "w4a4"),), "a")
    assert found == Rule("*", "shortcut", bits=Bits(4, 4))
    unrotated = changed(Rule("*", "base"), (SiteRule("a", rotation=False, why="few channels"),), "a")
    assert unrotated == Rule("*", "few channels", rotate=False)


@pytest.mark.parametrize("rule", RULES)
def test_round_trip_as_data(rule: SiteRule) -> None:
    assert rule_from_data(rule_to_data(rule), "here") == rule
    assert QuantPlan.from_dict(QuantPlan(rules=(rule,)).to_dict()).rules == (rule,)


def test_a_plan_without_rules_is_written_as_before_there_were_any() -> None:
    assert "rules" not in QuantPlan().to_dict()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("conv_in", "is 'conv_in'; expected a mapping"),
        ({"bits": "w4a4"}, "lacks its pattern"),
        ({"pattern": ""}, "says nothing about its sites"),
        ({"pattern": "", "bits": "w4a4"}, "its pattern is empty"),
        ({"pattern": "*"}, "says nothing about its sites"),
        ({"pattern": "*", "bits": None, "why": "so"}, "says nothing about its sites"),
        ({"pattern": "*", "weight": 4}, "has no field 'weight'; there are pattern, bits, rotation"),
        ({"pattern": "*", "where": "x"}, "has no field 'where'"),
        ({"pattern": 4, "bits": "w4a4"}, "pattern is '4'; expected a text"),
        ({"pattern": "*", "bits": 4}, "bits is '4'; expected wNaM, or float"),
        ({"pattern": "*", "bits": "w9a4"}, "bits 'w9a4': expected wNaM with N and M in 2…8, or float"),
        ({"pattern": "*", "rotation": 32}, "rotation is '32'; expected true, false, or kind and order"),
        ({"pattern": "*", "rotation": "sylvester 256"}, "there are sylvester 8, 16, 32, 64, 128; regular 16,"),
        ({"pattern": "*", "rotation": "regular"}, "rotation is 'regular'"),
        ({"pattern": "*", "lora_rank": 1.5}, "lora_rank is '1.5'; expected a whole number"),
        ({"pattern": "*", "lora_rank": True}, "lora_rank is 'True'; expected a whole number"),
        ({"pattern": "*", "lora_rank": -1}, "lora_rank is -1; expected 0 or more"),
        ({"pattern": "*", "lora_rank": 4, "trained": False}, "lora_rank is 4, and trained is false"),
        ({"pattern": "*", "lora_rank": 4, "bits": "float"}, "lora_rank is 4, and its bits are float"),
        ({"pattern": "*", "trained": "no"}, "trained is 'no'; expected true or false"),
    ],
)
def test_what_is_no_rule_is_refused_with_its_place(data: Any, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        rule_from_data(data, "plan mine.yaml, rule 2")
    assert caught.value.line.startswith("plan mine.yaml, rule 2: ")
    assert said in caught.value.line
    assert len(caught.value.line) <= 300


def test_a_rule_says_what_it_says() -> None:
    assert str(RULES[1]) == "up.*: bits w8a8 (sensitive)"
    assert str(RULES[3]) == "*.q: rotation False (asked for in the plan)"
