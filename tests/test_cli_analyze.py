"""`hqc analyze` and `hqc compare` on a tiny pipeline: what they write, what they say, what they refuse."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import zoo
from command_line import hqc
from command_line import silently_ok as ok
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.capture import trace
from hqc.storage import load_program, save_program

FEW = ("--n-steps", "3", "--calib-size", "2")


def refused(folder: Path, *arguments: object) -> str:
    """The one line that a refused command says; nothing new lies in the folder."""
    before = sorted(folder.rglob("*"))
    result = hqc(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("hqc: ")
    assert result.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    return result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A captured and a quantised program, an export, and a program of another model."""
    work = tmp_path_factory.mktemp("analyze")
    program, rotated = work / "program.hqc", work / "rotated.hqc"
    save_program(traced_pipeline("classes"), program, pipeline=saved_pipeline("classes"))
    ok("ptq", program, "-o", rotated, *FEW, "--hadamard")
    integer, other = work / "integer", work / "other.hqc"
    ok("export", rotated, "-o", integer)
    save_program(trace(zoo.in_place()), other)
    return SimpleNamespace(work=work, program=program, rotated=rotated, integer=integer, other=other)


def test_analyze_writes_a_report_csv_and_json(made: SimpleNamespace, tmp_path: Path) -> None:
    page, table = tmp_path / "report.html", tmp_path / "rows.csv"
    said = ok("analyze", made.program, "-o", page, "--csv", table, *FEW, "--json", "--bits", "W4A3")
    data = json.loads(said.stdout)
    names = [site for site, _ in load_program(made.rotated).sites()]  # without attention over one key
    assert [site["plan"]["site"] for site in data["sites"]] == names
    assert data["measured"]["program"] == "program.hqc"
    assert data["measured"]["bits"] == "w4a3"
    assert (data["measured"]["images"], data["measured"]["steps"], data["measured"]["seed"]) == (2, 3, 2024)
    assert len(data["sensitivity"]) == len(names)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 3 * len(names)
    assert {row["bits"] for row in rows} == {"w4a3", "w8a8"}
    text = page.read_text(encoding="utf-8")
    assert all(text.count(f'<th scope="row">{name.replace(".", ".<wbr>")}</th>') == 1 for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "rows.csv"]


def test_analyze_is_deterministic(made: SimpleNamespace, tmp_path: Path) -> None:
    first, second, other = (tmp_path / f"{name}.html" for name in "abc")
    said = ok("analyze", made.program, "-o", first, *FEW)
    assert "97" not in said.stdout
    assert "max/RMS, before → after rotation" in said.stdout
    assert "most sensitive, 1" in said.stdout
    ok("analyze", made.program, "-o", second, *FEW)
    ok("analyze", made.program, "-o", other, *FEW, "--seed", "5")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_analyze_takes_a_quantised_program_with_its_own_plan(made: SimpleNamespace, tmp_path: Path) -> None:
    said = ok("analyze", made.rotated, "-o", tmp_path / "r.html", *FEW, "--json", "--no-sensitivity")
    data = json.loads(said.stdout)
    program = load_program(made.rotated)
    assert data["sensitivity"] == []
    assert data["measured"]["stage"] == "quantised"
    for site in data["sites"]:
        table = program.state[f"{site['plan']['site']}.activation_scale_table"].tolist()
        assert [row["program_scale"] for row in site["rows"]] == table


def test_analyze_refuses_before_it_works(made: SimpleNamespace, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert "--bits: PROGRAM is quantised" in refused(tmp_path, "analyze", made.rotated, "-o", page, "--bits", "w4a4")
    assert "bits 'w9a4'" in refused(tmp_path, "analyze", made.program, "-o", page, "--bits", "w9a4")
    page.write_text("mine", encoding="utf-8")
    assert "already exists" in refused(tmp_path, "analyze", made.program, "-o", page)
    assert page.read_text(encoding="utf-8") == "mine"
    ok("analyze", made.program, "-o", page, "--force", "--no-sensitivity", "--n-steps", "1", "--calib-size", "1")
    assert "Not measured (--no-sensitivity)." in page.read_text(encoding="utf-8")


def test_analyze_without_plotly_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hqc.evaluation.drawing.importlib.util.find_spec", lambda name: None)
    said = refused(tmp_path, "analyze", tmp_path, "-o", tmp_path / "report.html")
    assert said == "hqc: hqc analyze: plotly is not installed. Run `pip install 'hqc[report]'`.\n"


# ---- compare -------------------------------------------------------------------------------------------------------

SMALL = ("--n-steps", "3", "--batch-size", "1", "--timesteps", "2")


def test_compare_ranks_the_sites_of_two_programs(made: SimpleNamespace, tmp_path: Path) -> None:
    table = tmp_path / "errors.csv"
    data = json.loads(ok("compare", made.program, made.rotated, *SMALL, "--json", "--csv", table).stdout)
    float_names, names = ({s for s, _ in load_program(path).sites()} for path in (made.program, made.rotated))
    assert set(data["only_a"]) == float_names - names
    assert data["only_a"]
    assert data["only_b"] == []
    errors = [site["arrives"]["relative"] for site in data["sites"]]
    assert {site["site"] for site in data["sites"]} == names
    assert errors == sorted(errors, reverse=True)
    assert all(site["made"]["relative"] > 0 for site in data["sites"])
    assert 0 < data["output"]["relative"] < 1
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [row["site"] for row in rows] == [site["site"] for site in data["sites"]]
    assert float(rows[0]["relative"]) == pytest.approx(errors[0], rel=1e-6)
    made_first = json.loads(ok("compare", made.program, made.rotated, *SMALL, "--json", "--by", "made").stdout)
    made_errors = [site["made"]["relative"] for site in made_first["sites"]]
    assert made_errors == sorted(made_errors, reverse=True)
    assert sorted(errors) == sorted(site["arrives"]["relative"] for site in made_first["sites"])


def test_compare_takes_an_export(made: SimpleNamespace) -> None:
    noise = ("--inputs", "noise", *SMALL[2:])
    said = ok("compare", made.rotated, made.integer, *noise, "--top", "3").stdout
    lines = said.splitlines()
    assert lines[0] == "integer against rotated.hqc, worst site first"
    assert lines[2].split() == [*("relative", "cosine", "max", "abs", "SQNR,", "dB", "relative", "SQNR,", "dB", "site")]
    assert len(lines) == 3 + 3 + 2
    assert lines[6].startswith("output: relative ")
    assert "2 noise inputs" in lines[6]
    data = json.loads(ok("compare", made.rotated, made.integer, *SMALL, "--json").stdout)
    assert [site["note"] for site in data["sites"]] == [""] * len(data["sites"])
    assert data["note"] == ""


def test_compare_refuses_what_cannot_be_compared(made: SimpleNamespace, tmp_path: Path) -> None:
    assert "expected a Program" in refused(made.work, "compare", made.integer, made.rotated)
    assert "inputs: of the second are" in refused(made.work, "compare", made.program, made.other, *SMALL)
    said = refused(made.work, "compare", made.other, made.other, *SMALL)
    assert "Give --inputs noise." in said
    renamed, program = tmp_path / "renamed.hqc", load_program(made.other)
    for _, layer in program.sites():
        layer.meta["site"] = f"other.{layer.meta['site']}"
    save_program(program, renamed)
    said = refused(tmp_path, "compare", made.other, renamed, "--inputs", "noise")
    assert said == "hqc: programs: have no site in common. Compare programs of the same source.\n"
    assert "no such folder" in refused(made.work, "compare", made.program, tmp_path / "nothing")
