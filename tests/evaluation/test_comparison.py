"""compare-recipes as a whole on a tiny pipeline: the table, kills and what is kept, failing cells, what is refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.cli import main
from hqc.errors import ExportError, TrainingError
from hqc.evaluation.comparison import cells
from hqc.evaluation.workspace import content
from hqc.program import Program
from hqc.recipes.work_folder import Run
from hqc.storage import load_program, save_program
from hqc.training import distil

PTQ = """name: quick
source: a test
sampler: {num_inference_steps: 2}
steps:
  - select_layers: {rules: all}
  - insert_qdq
  - calibrate_weights: {candidates: 4}
  - calibrate_activations: {samples: 1, candidates: 4}
"""
QAT = (
    PTQ.replace("quick", "learnt")
    + """  - attach_lora: {rank: 2, seed: 5}
  - distil:
      epochs: 2
      batch_size: 1
      checkpoint_every: 1
      groups:
        - {group: {pattern: "*.lora_?", rate: 0.01}}
        - {group: {pattern: "*.weight_scale", rate: 0.00001, positive: true}}
"""
)
LEARNT_COST = 1 * 2 * 2 + 4 * 4 * 2  # calibration; 4 updates of one image with guidance


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A program in its folder, and two recipes."""
    work = tmp_path_factory.mktemp("compare-recipes")
    save_program(traced_pipeline("classes"), work / "tiny.hqc", pipeline=saved_pipeline("classes"))
    (work / "quick.yaml").write_text(PTQ)
    (work / "learnt.yaml").write_text(QAT)
    return SimpleNamespace(work=work, program=work / "tiny.hqc", quick=work / "quick.yaml", learnt=work / "learnt.yaml")


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds come from processes that take seconds to start; see the benchmark's own tests."""
    monkeypatch.setattr(cells, "median_milliseconds", lambda artefacts, timing: dict.fromkeys(artefacts, 1.5))


class Raises:
    """Stands for a function that raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *args: Any, **options: Any) -> None:
        raise self.error


def compare(made: SimpleNamespace, output: Path, recipes: str, *more: object) -> Result:
    """Runs the command with two images and two steps."""
    arguments = [made.program, "--bits", "w4a4", "--recipes", recipes, "--images", "2", "--n-steps", "2", "-o", output]
    line = ["compare-recipes", *map(str, (*arguments, *more))]
    return CliRunner(catch_exceptions=False).invoke(main, line)


def seeds_of(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The cells of a recipe by seed."""
    return next(dict(row["cells"]) for row in data["rows"] if row["recipe"] == name)


def kill_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """The call after so many of a function is interrupted before it does anything."""
    own: Callable[..., Any] = getattr(owner, name)
    count = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return own(*args, **options)

    monkeypatch.setattr(owner, name, counted)


def made_stages(result: Result) -> list[str]:
    """The stages that were made, not taken."""
    lines = [line for line in result.stderr.splitlines() if line.endswith(" s")]
    return [line.partition(":")[0] for line in lines if not line.startswith("[")]


def test_a_kill_costs_one_stage_and_the_table_is_that_of_a_whole_run(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipes = tmp_path / "table.md", f"{made.quick},{made.quick}+hadamard"
    more = ("--seeds", 2, "--html", tmp_path / "table.html", "--chart", tmp_path / "table.svg")
    with monkeypatch.context() as patch:
        kill_after(patch, cells, "save_drawn", 3)  # of the second recipe's images, in the second seed's turn
        killed = compare(made, output, recipes, *more)
    assert killed.exit_code == 1
    assert f"the same command goes on from {output}.work" in killed.stderr
    assert made_stages(killed)[:5] == [
        *("w4a4-quick-0.hqc", "w4a4-quick-0-onnx", "w4a4-quick-0-images", "float-0-images", "w4a4-quick-0-figures")
    ]
    assert "1 of 2" in output.read_text()  # the first seed of both recipes is there
    went_on = compare(made, output, recipes, *more, "--json")
    assert went_on.exit_code == 0, went_on.stderr
    assert made_stages(went_on)[0] == "w4a4-quick-1-images"
    assert "w4a4-quick-0-images: 0.0 s, kept from an earlier run" in went_on.stderr
    tables = [output.read_bytes(), (tmp_path / "table.html").read_bytes(), (tmp_path / "table.svg").read_bytes()]
    again = compare(made, output, recipes, *more, "--json")
    assert made_stages(again) == []
    assert [path.read_bytes() for path in (output, tmp_path / "table.html", tmp_path / "table.svg")] == tables
    data = json.loads(went_on.stdout)
    assert json.loads(again.stdout) == data

    # What the figures say.
    rows = {row["recipe"]: row for row in data["rows"]}
    assert set(rows) == {"quick", "quick+hadamard"}
    assert data["ranked_by"] == "psnr_db"
    assert data["why_unscored"].startswith("2 images")
    first, second = (seeds_of(data, "quick")[seed] for seed in "01")
    assert first["integer_sites"] == first["sites"] > 10
    assert first["export_error"] < 1e-4
    exported = output.with_name(f"{output.name}.work") / "w4a4-quick-0-onnx"
    assert first["file_bytes"] == sum(path.stat().st_size for path in exported.glob("model.onnx*"))
    assert first["evaluations"] == 4
    assert first["ort_milliseconds"] == 1.5
    assert first["psnr_db"] != second["psnr_db"]

    # Seeds are paired: both recipes are compared with the same float images, and calibrated with the seed's own.
    work = output.with_name(output.name + ".work")
    samples = [json.loads((work / f"{name}-images" / "samples.json").read_text())["seeds"] for name in _CELLS]
    assert samples == [[0, 1], [0, 1], [0, 1], [1000, 1001], [1000, 1001], [1000, 1001]]
    steps = [load_program(work / f"w4a4-quick-{seed}.hqc").plan.training["steps"] for seed in (0, 1)]
    assert [found["calibrate_activations.seed"] for found in steps] == [2024, 2025]


_CELLS = [f"{name}-{seed}" for seed in (0, 1) for name in ("float", "w4a4-quick", "w4a4-quick+hadamard")]


def test_a_killed_training_goes_on_where_it_was(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--seeds", 1, "--own-budgets")
    with monkeypatch.context() as patch:
        kill_after(patch, Run, "save", 2)  # a checkpoint an update: the third one is not written
        killed = compare(made, tmp_path / "killed.md", str(made.learnt), *options)
    assert killed.exit_code == 1
    assert len(list((tmp_path / "killed.md.work" / "training").iterdir())) == 1
    steps = []
    own = distil._update
    monkeypatch.setattr(distil, "_update", lambda state, *rest: steps.append(state.step) or own(state, *rest))
    went_on = compare(made, tmp_path / "killed.md", str(made.learnt), *options, "--json")
    assert (went_on.exit_code, steps) == (0, [2, 3])
    assert not list((tmp_path / "killed.md.work" / "training").iterdir())
    whole = compare(made, tmp_path / "whole.md", str(made.learnt), *options, "--json")
    assert (whole.exit_code, steps) == (0, [2, 3, 0, 1, 2, 3])
    programs = [tmp_path / f"{name}.md.work" / "w4a4-learnt-0.hqc" for name in ("killed", "whole")]
    weights = [content(program)["weights.safetensors"] for program in programs]
    assert weights[0] == weights[1]
    found = seeds_of(json.loads(went_on.stdout), "learnt")["0"]
    assert (found["factor"], found["evaluations"]) == (1.0, LEARNT_COST)
    assert found["seconds"] > 0
    plan = load_program(programs[0]).plan.training["steps"]
    assert (plan["distil.seed"], plan["attach_lora.seed"]) == (3407, 5)


def test_a_recipe_with_a_plan_is_a_row_at_the_bits_of_its_plan(made: SimpleNamespace, tmp_path: Path) -> None:
    plan = tmp_path / "found.yaml"
    plan.write_text("bits: w4a3\nrules:\n- {pattern: '*.attn1.*', bits: w8a8}\n", encoding="utf-8")
    output, options = tmp_path / "table.md", ("--seeds", 1, "--bits", "w4a4,w4a3", "--json")
    found = compare(made, output, f"{made.quick},{made.quick}@{plan}", *options)
    assert found.exit_code == 0, found.stderr
    rows = [(row["bits"], row["recipe"]) for row in json.loads(found.stdout)["rows"]]
    assert sorted(rows) == [("w4a3", "quick"), ("w4a3", "quick@found"), ("w4a4", "quick")]
    programs = [output.with_name("table.md.work") / f"w4a3-{name}-0.hqc" for name in ("quick", "quick@found")]
    found_bits = [_bits_within(program, ".attn1.") for program in programs]
    assert found_bits == [{(4, 3)}, {(8, 8)}]

    plan.write_text("bits: w4a3\nrules:\n- {pattern: '*.attn1.*', bits: w6a6}\n", encoding="utf-8")
    changed = compare(made, output, f"{made.quick}@{plan}", *options, "--bits", "w4a3")
    assert made_stages(changed)[0] == "w4a3-quick@found-0.hqc"  # another plan is another cell
    refused = compare(made, output, f"{made.quick}@{plan}", *options, "--bits", "w4a4")
    assert refused.exit_code == 2
    assert "says bits w4a3, and w4a4 is asked for" in refused.stderr


def _bits_within(program: Path, part: str) -> set[tuple[int, int]]:
    """Of all its sites whose name has that part."""
    sites = [site for site in load_program(program).plan.sites if part in site.site]
    return {(site.weight_bits, site.activation_bits) for site in sites}


def test_a_cell_that_fails_is_a_row_and_the_others_go_on(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(program: Program, *rest: Any, **options: Any) -> None:
        raise ExportError("target onnxruntime", "does not take this", "Use another.")

    monkeypatch.setattr(cells, "export_program", refused)
    output = tmp_path / "table.md"
    found = compare(made, output, f"{made.learnt},{made.quick}", "--seeds", 1, "--budget-qat", 3)
    assert found.exit_code == 1
    text = output.read_text()
    assert "learnt w4a4, seed 0 failed: budget 3: recipe 'learnt' needs 12 evaluations with one" in text
    assert "| none: target onnxruntime: does not take this |" in text  # drawn by torch, and a row like others
    assert text.index("| 1 | quick |") < text.index("| – | learnt |")

    for error, said in (
        (TrainingError("sampling", "met NaN", "Look."), "sampling: met NaN. Look."),
        (ValueError("odd"), "quick w4a4: its ClassConditionalLDMPipeline cannot be run (ValueError: odd)."),
    ):
        monkeypatch.setattr(cells, "sample_images", Raises(error))
        again = compare(made, output, str(made.quick), "--seeds", 1, "--images", 1)
        assert again.exit_code == 1
        assert f"quick w4a4, seed 0 failed: {said}" in output.read_text()


def test_what_is_not_the_works_own_is_left_alone(made: SimpleNamespace, tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    output.write_text("mine")
    said = compare(made, output, str(made.quick), "--seeds", 1)
    assert (said.exit_code, said.stderr.count("\n")) == (2, 1)
    assert said.stderr.startswith(f"hqc: {output}: already exists.")
    work = tmp_path / "w"
    work.mkdir()
    (work / "comparison.json").write_text(
        json.dumps({"format": "hqc-comparison", "program": hashlib.sha256(b"x").hexdigest(), "outputs": {}})
    )
    said = compare(made, tmp_path / "other.md", str(made.quick), "--work-dir", work)
    assert (said.exit_code, said.stderr.count("\n")) == (2, 1)
    assert "is the work folder of another program" in said.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.md", "w"]
    assert [path.name for path in work.iterdir()] == ["comparison.json"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--chart", "x.jpg"), "--chart x.jpg: is neither .png nor .svg"),
        (("--chart", "x.png", "--without"), "--chart: matplotlib is not installed"),
        (("--html", "x.html", "--without"), "--html: matplotlib is not installed"),
    ],
)
def test_plots_that_cannot_be_drawn_are_refused_before_any_work(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--without" in options:
        options = tuple(option for option in options if option != "--without")
        monkeypatch.setattr("hqc.evaluation.drawing.importlib.util.find_spec", lambda name: None)
    found = compare(made, Path("t.md"), str(made.quick), *options)
    assert found.exit_code == 2
    assert found.stderr.startswith(f"hqc: {said}")
    assert list(tmp_path.iterdir()) == []
