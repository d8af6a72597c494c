"""Budgets as they are typed, costs against the tensors that there are, the journal of measurements."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hqc.errors import ArtefactError, PlanError
from hqc.evaluation.comparison.size import true_bytes
from hqc.program import Program
from hqc.recipes import RECIPES, find_recipe
from hqc.recipes.run import Request, planned
from hqc.search.budget import Budget, parse_budget, shown
from hqc.search.costs import CostTable, cost_table, limit_of, multiply_adds
from hqc.search.journal import Journal
from hqc.search.run import parse_candidates
from hqc.site_rules import SiteRule

Captured = Callable[[str], Program]
TABLE = CostTable("bytes", ("w2a8", "w4a8"), {"a": (16, 32), "b": (8, 40)}, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200MB", Budget("200MB", amount=200e6)),
        ("1.5MiB", Budget("1.5MiB", amount=1.5 * 2**20)),
        (" 12 kib", Budget(" 12 kib", amount=12 * 2**10)),
        ("7 bytes", Budget("7 bytes", amount=7)),
        ("3.2GBOPs", Budget("3.2GBOPs", "BOPs", 3.2e9)),
        ("2tbop", Budget("2tbop", "BOPs", 2e12)),
        ("80%", Budget("80%", share=0.8)),
        ("W4A8", Budget("W4A8", bits="w4a8")),
    ],
)
def test_budgets(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize(
    "text", ["", "much", "0MB", "-1MB", "1e3MB", "3GiBOPs", "4iB", "12", "nanMB", "1XB", "5%B", "wide"]
)
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(PlanError):
        parse_budget(text)


def test_amounts_in_words() -> None:
    assert [shown(n, "bytes") for n in (0, 1, 999, 123_456, 5e9)] == ["0 B", "1 B", "999 B", "123.46 kB", "5 GB"]
    ends = shown(123_456.7, "BOPs", up=True), shown(123_456.7, "BOPs", down=True)
    assert ends == ("123.46 kBOPs", "123.45 kBOPs")


@pytest.mark.parametrize(
    ("budget", "limit"),
    [("8B", 64), ("4B", 32), ("100%", 80), ("50%", 40), ("w2a8", 32), ("w4a8", 80), ("10B", 80)],
)
def test_what_a_plan_may_take(budget: str, limit: int) -> None:
    assert limit_of(parse_budget(budget), TABLE) == limit


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("3.9B", "--budget 3.9B: is below every plan of w2a8, w4a8. Give one from 4 B to 10 B."),
        ("11B", "--budget 11B: is above every plan of w2a8, w4a8. Give one from 4 B to 10 B."),
        ("39%", "--budget 39%: is below every plan of w2a8, w4a8. Give one from 4 B to 10 B."),
        ("w3a8", "--budget w3a8: is none of the candidates w2a8, w4a8. Add it to --candidates."),
    ],
)
def test_a_budget_outside_says_both_ends(budget: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        limit_of(parse_budget(budget), TABLE)
    assert caught.value.line == said


@pytest.mark.parametrize("text", ["w4a4", "w4a4,W4A4", "", "w4a4,w9a9", "w4a4,"])
def test_candidates_that_leave_nothing_to_choose(text: str) -> None:
    with pytest.raises(PlanError):
        parse_candidates(text)


SEARCHED = [name for name, recipe in RECIPES.items() if recipe.step("insert_qdq").activation != "float"]


@pytest.mark.parametrize("recipe", SEARCHED)
def test_bytes_are_those_of_the_program(captured: Captured, recipe: str) -> None:
    """At equal bits, and of a mixed plan whose own bits are any of the candidates: to the bit."""
    program, own = captured("cross_attention"), find_recipe(recipe).untrained()
    programs = {bits: planned(program, own, Request(bits), calibrated=False) for bits in ("w3a6", "w8a8")}
    table = cost_table(programs, "bytes")
    chosen = [i % 2 for i in range(len(table.sites))]
    rules = tuple(SiteRule(site, table.candidates[one]) for site, one in zip(table.sites, chosen, strict=True))
    for number, (bits, made) in enumerate(programs.items()):
        assert table.uniform(number) == 8 * true_bytes(made)
        mixed = planned(program, own, Request(bits, rules=rules), calibrated=False)
        assert table.on(number).total(chosen) == 8 * true_bytes(mixed)
    assert table.ends[0] <= table.uniform(0) < table.uniform(1) <= table.ends[1]
    assert not {"conv_in", "conv_out"} & table.sites.keys(), "the rules fix their bits"


@pytest.mark.parametrize(
    ("recipe", "bits", "width", "beside"),
    [
        ("rtn", "w2a8", 4, 0),
        ("rtn", "w5a8", 8, 0),
        ("efficientdm", "w3a4", 4, 8),
        ("efficientdm", "w6a6", 8, 0),
        ("mpq-dm", "w3a4", 4, 8),
        ("mpq-dm", "w4a4", 6, 40),
        ("mpq-dmv2", "w4a4", 8, 8),
        ("ganq-int8", "w4a4", 8, 0),
    ],
)
def test_bytes_of_files(captured: Captured, recipe: str, bits: str, width: int, beside: int) -> None:
    """A code takes four bits or eight, asymmetric ones an offset a channel besides, all else what it does anyway."""
    own = find_recipe(recipe).untrained()
    made = {bits: planned(captured("two_sites"), own, Request(bits, ("head",)), calibrated=False)}
    by_bits, files = (cost_table(made, "bytes", count) for count in ("bits", "files"))
    (site,) = files.sites
    plan, true = made[bits].plan[site], int(bits[1])
    table = 8 * plan.out_channels * 2**true if plan.weight_lookup else 0
    codes = plan.out_channels * plan.in_channels * 9
    assert files.sites[site][0] - by_bits.sites[site][0] == codes * (width - true) + beside * plan.out_channels - table


def test_bit_operations(captured: Captured) -> None:
    """A convolution without padding and a linear layer, counted by hand."""
    program = captured("two_sites")
    layers = dict(program.sites())
    outputs = layers["conv"].meta["shape"]
    by_hand = {"conv": outputs[1] * outputs[2] * outputs[3] * 32 * 9, "head": layers["head"].meta["shape"][1] * 5 * 16}
    assert {site: multiply_adds(layer) for site, layer in layers.items()} == by_hand
    programs = {
        bits: planned(program, find_recipe("rtn"), Request(bits, ("head",)), calibrated=False)
        for bits in ("w2a3", "w4a8")
    }
    table = cost_table(programs, "BOPs")
    assert table.sites == {"conv": (6 * by_hand["conv"], 32 * by_hand["conv"])}
    assert table.fixed == 32 * 32 * by_hand["head"], "a site that stays float"


def test_nothing_to_choose_is_refused(captured: Captured) -> None:
    program = captured("two_sites")
    programs = {
        bits: planned(program, find_recipe("rtn"), Request(bits, ("*",)), calibrated=False) for bits in ("w2a3", "w4a8")
    }
    with pytest.raises(PlanError, match="leave no site to choose bits for"):
        cost_table(programs, "bytes")


def test_the_journal_keeps_what_was_measured(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "w")
    journal.add("one", 0.1 + 0.2, "a")
    journal.add("one", 0.5)
    with (tmp_path / "w" / "measured.jsonl").open("a") as file:
        file.write('{"key": "one", "site": "b", "err')  # killed while writing
    again = Journal(tmp_path / "w")
    assert (again.get("one", "a"), again.get("one"), again.get("one", "b"), again.get("two", "a")) == (
        0.1 + 0.2,
        0.5,
        None,
        None,
    )
    again.add("one", 0.25, "b")
    assert Journal(tmp_path / "w").get("one", "b") == 0.25


def test_a_file_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "measured.jsonl").write_text("mine\n")
    with pytest.raises(ArtefactError, match="was not written by hqc"):
        Journal(tmp_path)
    assert (tmp_path / "measured.jsonl").read_text() == "mine\n"
