"""A search from end to end: the plan, what it predicts and measures, resuming, the command."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from test_cli import ok, refused

import hqc
from hqc.commands.search import _lines
from hqc.errors import MemoryShortError, PassError, PlanError
from hqc.evaluation.comparison.size import true_bytes
from hqc.evaluation.sensitivity import SensitivityProbe
from hqc.export import export_program
from hqc.program import Program
from hqc.recipes import Recipe, find_recipe
from hqc.recipes.plan_file import plan_yaml, read_plan
from hqc.sampling import synthetic_task
from hqc.search import Asked, Found, parse_budget, search
from hqc.search.journal import Journal
from hqc.search.measure import Measure
from hqc.storage import load_program, save_program

Captured = Callable[[str], Program]
CANDIDATES = ("w2a8", "w4a8", "w8a8")


def quick(name: str = "rtn") -> Recipe:
    recipe = find_recipe(name).set("sampler.num_inference_steps", 2)
    return recipe.set("calibrate_activations.samples", 1).set("calibrate_activations.candidates", 10)


def searched(program: Program, budget: str, **more: Any) -> Found:
    asked = Asked(parse_budget(budget), CANDIDATES, samples=2, timesteps=2, count="bits")
    return search(program, quick(), synthetic_task(program), asked, **more)


@pytest.fixture(scope="module")
def program(captured: Captured) -> Program:
    return captured("without_attention")


@pytest.fixture(scope="module")
def found(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return searched(program, "w4a8", folder=tmp_path_factory.getbasetemp() / "search")


def test_the_plan_is_better_than_equal_bits_of_as_many_bytes(found: Found) -> None:
    assert found.found.cost <= found.budget == found.uniform.cost
    assert found.found.predicted < found.uniform.predicted
    assert found.found.measured < found.uniform.measured
    assert found.uniform.bits == "w4a8"
    assert len(found.widths) > 1
    assert found.found.measured == pytest.approx(found.found.predicted, rel=0.5), "errors of single sites add up"


def test_a_plan_that_errs_more_than_equal_bits_is_said_to(found: Found) -> None:
    worse = replace(found, found=replace(found.found, measured=1.5 * found.uniform.measured))
    said = "w4a8 everywhere errs less and is what the plan says: errors of single layers do not add up here"
    assert _lines(worse)["but"] == said
    assert worse.to_dict()["written"] == "w4a8"
    assert "but" not in _lines(found)
    assert found.to_dict()["written"] == "mixed"


def test_where_equal_bits_err_less_they_are_the_plan(
    program: Program, found: Found, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Measure.plan

    def measured(self: Measure, bits: str, rules: Any = ()) -> float:
        return own(self, bits, rules) * (10.0 if rules else 1.0)

    monkeypatch.setattr(Measure, "plan", measured)
    worse = searched(program, "w4a8", folder=tmp_path_factory.getbasetemp() / "search")
    assert worse.written is worse.uniform
    assert worse.choices == found.choices
    assert {rule.bits for rule in worse.plan.rules} == {"w4a8"} == {worse.plan.bits}
    assert [rule.pattern for rule in worse.plan.rules] == [choice.site for choice in worse.choices]


def code_bytes(path: Path) -> int:
    """Of the weights' codes in an export."""
    stored = onnx.load(str(path / "model.onnx")).graph.initializer
    return sum(len(one.raw_data) for one in stored if ".weight_codes" in one.name or ".weight_packed" in one.name)


def test_a_budget_of_files_counts_what_the_export_stores(
    program: Program, found: Found, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """w2 takes there what w4 takes, and what is not codes takes the same whatever the plan."""
    task, rest = synthetic_task(program), set()
    for budget in ("w4a8", "75%"):
        asked = Asked(parse_budget(budget), CANDIDATES, samples=2, timesteps=2)
        made = search(program, quick(), task, asked, folder=tmp_path_factory.getbasetemp() / "search")
        assert made.found.cost <= made.budget
        assert "w2a8" not in made.widths
        plan = tmp_path / "plan.yaml"
        plan.write_text(plan_yaml(made.plan), encoding="utf-8")
        folder = tmp_path / f"{budget}.onnx"
        report = export_program(hqc.ptq(program, quick(), plan=plan, task=task), "onnxruntime", folder)
        rest.add(made.written.cost - code_bytes(folder))
        assert report.size_bytes > made.written.cost, "the graph comes besides"
    assert len(rest) == 1
    assert made.ends[0] > found.ends[0], "by bits w2 is smaller"


def test_predicted_is_the_root_of_the_sum_of_squares(found: Found) -> None:
    squares = sum(choice.error**2 for choice in (*found.choices, *found.fixed))
    assert found.found.predicted == pytest.approx(squares**0.5)
    assert {choice.bits for choice in found.fixed} == {"w8a8"}
    first = found.plan.rules[0]
    assert first.why == f"error {found.choices[0].error:.2e} of {found.found.predicted:.2e}"


def test_ptq_by_the_plan_takes_what_was_said(program: Program, found: Found, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(plan_yaml(found.plan), encoding="utf-8")
    made = hqc.ptq(program, quick(), plan=tmp_path / "plan.yaml", task=synthetic_task(program))
    assert true_bytes(made) == found.found.cost
    assert {site.site: site.widths for site in made.plan.sites} == {
        choice.site: choice.bits for choice in (*found.choices, *found.fixed)
    }


def test_a_site_measured_alone_is_what_the_probe_says(program: Program, found: Found) -> None:
    task = synthetic_task(program)
    made = hqc.ptq(program, quick(), "w4a8", task=task)
    measure = Measure(program, quick(), task, (), 2, 2, 2024, Journal(None))
    one = found.choices[3].site
    probe = SensitivityProbe(program, made, measure.inputs, [one])
    assert [s.site for s in probe.measure()] == [one]
    assert measure.sites("w4a8", [one], lambda done, note: None) == {one: probe.measure()[0].error}


def test_a_search_goes_on_where_it_was_killed(
    program: Program, found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: int, note: str) -> None:
        if done >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(program, "w4a8", folder=tmp_path / "w", phase=lambda name, total: nullcontext(killed))
    kept = (tmp_path / "w" / "measured.jsonl").read_text().splitlines()
    assert len(kept) == 30
    assert searched(program, "w4a8", folder=tmp_path / "w") == found, "to the bit"
    lines = (tmp_path / "w" / "measured.jsonl").read_text().splitlines()
    assert lines[:30] == kept
    assert len(set(lines)) == len(lines) == 3 * len(found.choices) + len(found.fixed) + 2

    def never(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("hqc.search.measure.run_recipe", never)
    assert searched(program, "w4a8", folder=tmp_path / "w") == found


def test_a_larger_budget_errs_less(program: Program, found: Found, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "search"
    more = searched(program, "90%", folder=folder)
    assert more.found.predicted < found.found.predicted
    assert more.ends == found.ends


def test_a_recipe_without_widths_of_products_is_refused(program: Program) -> None:
    asked = Asked(parse_budget("90%"), CANDIDATES, samples=2, timesteps=2)
    with pytest.raises(PlanError, match=r"search: recipe 'ganq' leaves activations float: no product has widths"):
        search(program, find_recipe("ganq"), synthetic_task(program), asked)


def test_memory_is_asked_first(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("something ran")

    for name in ("run_recipe", "trajectory_inputs", "SensitivityProbe"):
        monkeypatch.setattr(f"hqc.search.measure.{name}", never)
    monkeypatch.setattr("hqc.memory.available_bytes", lambda: 12_345)
    asked = r"measuring on 2 images at 2 timesteps: needs about [\d.]+ [kM]B of memory and 12\.3 kB are available"
    with pytest.raises(MemoryShortError, match=rf"{asked}\. Take fewer \(--samples, --timesteps\)"):
        searched(program, "w4a8", folder=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_quantised_program_is_refused(program: Program) -> None:
    task = synthetic_task(program)
    made = hqc.ptq(program, quick(), "w4a8", task=task)
    with pytest.raises(PassError, match="takes a program that is captured"):
        searched(made, "w4a8")


def test_the_command(program: Program, tmp_path: Path) -> None:
    source, plan = tmp_path / "p.hqc", tmp_path / "plan.yaml"
    save_program(program, source)
    some = ("--synthetic", "--n-steps", "2", "--calib-size", "1")
    few = ("--candidates", "w4a4,w8a8", "--samples", "1", "--timesteps", "1", *some)
    said = refused(tmp_path, "search", source, "--budget", "9TBOPs", "-o", plan, *few)
    assert said.startswith("--budget 9TBOPs: is above every plan of w4a4, w8a8. Give one from ")
    data = json.loads(ok("search", source, "--budget", "75%", "-o", plan, "--json", *few).stdout)
    assert data["found"]["cost"] <= data["budget"]
    assert read_plan(plan).rules[0].pattern == data["choices"][0]["site"]
    assert "# found: " in plan.read_text()
    ok("ptq", source, "-o", tmp_path / "q.hqc", "--plan", plan, *some)
    made = load_program(tmp_path / "q.hqc").plan
    assert {site.widths for site in made.quantised} == {"w4a4", "w8a8"}
    said = refused(tmp_path, "search", source, "--budget", "75%", "-o", plan, *few)
    assert said.startswith(f"{plan}: already exists")
