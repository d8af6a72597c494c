"""What is printed: JSON that parses, fields and tables that are whole, a progress bar that is silent in a pipe."""

import json
from collections.abc import Callable

import pytest
from rich.console import Console

from hqc import console, stages
from hqc.passes import InsertHadamard, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program
from hqc.recipes import find_recipe
from hqc.recipes.run import Request, planned


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"μ": 1.5, "list": [1, None], "text": "a\nb"}
    console.print_json(data)
    text = capsys.readouterr().out
    assert json.loads(text) == data
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_never_holds_what_is_not_json(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        console.print_json({"loss": value})


def test_fields_are_aligned_and_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A path may hold [brackets], which rich would take for markup, and be longer than the line."""
    path = "/tmp/[bold]/" + "x" * 200
    console.fields("traced", {"a": 1, "longer": path})
    assert capsys.readouterr().out == f"traced\n  a       1\n  longer  {path}\n"


def test_no_fields(capsys: pytest.CaptureFixture[str]) -> None:
    console.fields("nothing", {})
    assert capsys.readouterr().out == "nothing\n"


def test_progress_draws_no_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    """It is a stage then, of which lines are printed."""
    with console.progress("training", 3) as advance:
        for step in range(1, 4):
            advance(step, f"loss {step}")
        assert [(str(s), s.drawn) for s in stages._stages] == [("training: 3 of 3, loss 3", False)]
    assert capsys.readouterr() == ("", "")


def test_late_progress_is_a_stage_from_the_first_count_to_the_last() -> None:
    with console.late_progress("kernels") as advance:
        assert not stages._stages
        advance(1, 2, "a")
        assert list(map(str, stages._stages)) == ["kernels: 1 of 2, a"]
        advance(2, 2)
        assert not stages._stages


def test_progress_on_a_terminal_is_drawn_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "stderr", Console(stderr=True, force_terminal=True, width=120))
    with console.progress("training", 3, done=1) as advance:
        advance(2, "loss 0.5")
        assert [s.drawn for s in stages._stages] == [True]
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("training", "2/3", "loss 0.5", "ETA"):
        assert part in err


def test_sites_table_has_a_row_and_a_reason_for_every_site(captured: Callable[[str], Program]) -> None:
    program = planned(captured("awkward"), find_recipe("hq-dm"), Request("w4a3"))
    table = console.sites_table(program)
    rows = [tuple(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]
    assert [row[0] for row in rows] == [plan.site for plan in program.plan.sites]
    found = {row[0]: row for row in rows}
    assert found["fine"][1:7] == ("conv2d", "32", "32", "w4a3", "H32", "32")
    assert found["grouped"][4:] == ("float", "–", "–", program.plan["grouped"].reason)
    assert "grouped convolution (4 groups)" in found["grouped"][7]
    assert "is not the batch" in found["twice"][7]


@pytest.mark.parametrize(("weights", "name"), [(False, "regular H16"), (True, "regular H16, weight too")])
def test_sites_table_names_kind_and_order(captured: Callable[[str], Program], weights: bool, name: str) -> None:
    one = InsertHadamard(16, kind="regular", weights=weights)
    table = console.sites_table(run_pipeline(captured("two_sites"), [SelectLayers(), one]))
    assert [str(cell) for cell in next(c for c in table.columns if c.header == "rotation").cells] == [name, name]


def test_sites_table_prints_names_with_brackets(
    captured: Callable[[str], Program], capsys: pytest.CaptureFixture[str]
) -> None:
    program = planned(captured("two_sites"), find_recipe("rtn"), Request("w4a4", ("[hx]ead",)))
    console.console.print(console.sites_table(program))
    text = capsys.readouterr().out
    assert "rule '[hx]ead'" in " ".join(text.split())
