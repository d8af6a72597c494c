"""Bits, rules and plans."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.bits import Bits, parse_bits
from hqc.errors import PlanError
from hqc.plan import RULE_SETS, QuantPlan, Rule, SitePlan, decide

relaxed = settings(deadline=None, derandomize=True, max_examples=100)

widths = st.one_of(st.none(), st.tuples(st.integers(2, 8), st.integers(2, 8)))


@st.composite
def site_plans(draw: st.DrawFn) -> SitePlan:
    pair = draw(widths)
    return SitePlan(
        site=draw(st.text(max_size=10)),
        kind=draw(st.sampled_from(["conv2d", "linear"])),
        in_channels=draw(st.integers(1, 4096)),
        out_channels=draw(st.integers(1, 4096)),
        weight_bits=pair[0] if pair else None,
        activation_bits=pair[1] if pair else None,
        block=draw(st.sampled_from([0, 8, 16, 32])),
        lora_rank=draw(st.integers(0, 64)),
        reason=draw(st.text(max_size=10)),
    )


plans = st.builds(
    QuantPlan,
    recipe=st.text(max_size=5),
    bits=st.sampled_from(["", "w4a3", "w8a8"]),
    sites=st.lists(site_plans(), max_size=4).map(tuple),
    timesteps=st.lists(st.floats(0, 1000), max_size=4, unique=True).map(tuple),
    training=st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@relaxed
@given(plans)
def test_json_round_trip(plan: QuantPlan) -> None:
    assert QuantPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@relaxed
@given(st.integers(2, 8), st.integers(2, 8))
def test_bits_round_trip(weight: int, activation: int) -> None:
    assert parse_bits(str(Bits(weight, activation)).upper()) == Bits(weight, activation)


GOOD = SitePlan("conv", "conv2d", 32, 16, 4, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_bits": "4"},
        {"weight_bits": 4.0},
        {"weight_bits": 1},
        {"weight_bits": 9},
        {"weight_bits": None},
        {"activation_bits": None},
        {"weight_bits": True},
        {"block": "32"},
        {"block": -8},
        {"in_channels": None},
        {"site": 5},
        {"reason": None},
        {"rotation": "random"},
        {"rotation": None},
        {"rotation": "sylvester", "block": 256},
        {"rotation": "regular", "block": 8},
        {"weight_rotated": 1},
        {"weight_rotated": True, "block": 0},
        {"extra": 1},
        {"weight_symmetric": 0},
        {"weight_bits": 8, "weight_symmetric": False},
        {"activation_bits": 8, "activation_symmetric": False},
        {"weight_bits": None, "activation_bits": None, "weight_symmetric": False},
    ],
    ids=str,
)
def test_a_damaged_site_is_refused(change: dict[str, object]) -> None:
    data = json.loads(json.dumps(QuantPlan(sites=(GOOD,)).to_dict()))
    assert QuantPlan.from_dict(data).sites == (GOOD,)
    data["sites"][0] |= change
    with pytest.raises(PlanError, match=r"plan\.json: not a quantisation plan"):
        QuantPlan.from_dict(data)


def test_a_plan_of_an_older_version_is_read() -> None:
    data = json.loads(json.dumps(QuantPlan(sites=(GOOD,)).to_dict()))
    del data["sites"][0]["rotation"], data["sites"][0]["weight_rotated"]
    assert QuantPlan.from_dict(data).sites == (GOOD,)


@pytest.mark.parametrize("data", [{}, {"sites": 1}, [], None, "x", {"sites": [1]}, {"sites": [[]]}], ids=repr)
def test_what_is_no_plan_is_refused(data: object) -> None:
    with pytest.raises(PlanError):
        QuantPlan.from_dict(data)  # type: ignore[arg-type]


def test_a_plan_from_before_asymmetric_ranges_is_symmetric() -> None:
    data = json.loads(json.dumps(QuantPlan(sites=(GOOD,)).to_dict()))
    for name in ("weight_symmetric", "activation_symmetric"):
        del data["sites"][0][name]
    assert QuantPlan.from_dict(data).sites == (GOOD,)


def test_ranges_are_kept_and_shown() -> None:
    plan = replace(GOOD, weight_symmetric=False)
    data = json.loads(json.dumps(QuantPlan(sites=(plan,)).to_dict()))
    assert QuantPlan.from_dict(data).sites == (plan,)
    assert [p.widths for p in (GOOD, plan, replace(plan, activation_symmetric=False))] == ["w4a4", "w4*a4", "w4*a4*"]
    assert SitePlan("head", "linear", 16, 5).widths == "float"


def test_the_last_rule_that_matches_wins() -> None:
    rules = [Rule("*", "all"), Rule("down.*", "down"), Rule("*.conv", "convs")]
    assert [decide(s, rules).why for s in ("up", "down.q", "down.conv", "conv")] == ["all", "down", "convs", "all"]  # type: ignore[union-attr]
    assert decide("up", rules[1:]) is None
    assert decide("DOWN.q", rules[1:]) is None, "case matters"


@pytest.mark.parametrize(
    ("site", "rules", "expected"),
    [
        ("conv_in", "default", "conv_in: w8a8, unrotated (first or last layer)"),
        ("input_blocks.0.0", "default", "input_blocks.0.0: w8a8, unrotated (first or last layer)"),
        ("time_embed.0", "all", "time_embed.*: w8a8, unrotated (time embedding)"),
        ("mid_block.attentions.0.to_q", "reference", "*: asked bits (every conv and linear layer)"),
        ("up.0.conv_shortcut", "reference", "*conv_shortcut: float (shortcut or downsampler)"),
        ("up.0.conv_shortcut", "default", "*conv_shortcut: w8a8 (shortcut or downsampler)"),
        ("up.0.conv_shortcut", "all", "*: asked bits (every conv and linear layer)"),
    ],
)
def test_rule_sets(site: str, rules: str, expected: str) -> None:
    assert str(decide(site, RULE_SETS[rules])) == expected


def test_looking_up_sites() -> None:
    plan = QuantPlan(sites=(GOOD, SitePlan("head", "linear", 16, 5, reason="asked for")))
    assert plan["head"].reason == "asked for"
    assert "head" in plan
    assert "tail" not in plan
    assert plan.quantised == (GOOD,)
    with pytest.raises(KeyError):
        plan["tail"]
    changed = plan.with_sites({"conv": SitePlan("conv", "conv2d", 32, 16, 8, 8)})
    assert changed["conv"].weight_bits == 8
    assert plan["conv"].weight_bits == 4
