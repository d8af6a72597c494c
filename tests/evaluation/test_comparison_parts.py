"""The parts of compare-recipes that run no cell: entries, budgets against counted evaluations, seeds, ranks, tables."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc import api
from hqc.calibration import activations, site_rows
from hqc.errors import ArtefactError, PlanError
from hqc.evaluation.comparison.budget import Budgets, Scaled, default_budget, iterates, scaled
from hqc.evaluation.comparison.cells import _seconds, seeded
from hqc.evaluation.comparison.entries import find_entries, require_widths
from hqc.evaluation.comparison.images import Drawn, load_drawn, save_drawn
from hqc.evaluation.comparison.notes import notes_of
from hqc.evaluation.comparison.page import page
from hqc.evaluation.comparison.record import Record
from hqc.evaluation.comparison.rows import FID, PSNR, Comparison, Row, merged, ranked
from hqc.evaluation.comparison.size import true_bytes, weight_bytes
from hqc.evaluation.comparison.subject import Protocol
from hqc.evaluation.comparison.table import markdown
from hqc.evaluation.sampling import Samples, SamplingProtocol
from hqc.evaluation.workspace import fingerprint
from hqc.passes import FreezeIntegers, InsertHadamard, InsertQdq, InsertSmoothing, PackInt4, SelectLayers
from hqc.pipeline import Pass, run_pipeline
from hqc.program import PassRecord, Program
from hqc.recipes import RECIPES, Recipe
from hqc.recipes.files import recipe_yaml
from hqc.recipes.rotation import rotation
from hqc.recipes.run import Request, run_recipe
from hqc.recipes.work_folder import Run
from hqc.sampling import Update, Work
from hqc.steps import step_text
from hqc.training import taps

SAMPLER = {"num_inference_steps": 2, "guidance_scale": 1.5, "eta": 0.0}


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    """The tiny pipeline's program and its task."""
    program = traced_pipeline("classes")
    return SimpleNamespace(program=program, task=api.task_of(program, folder=saved_pipeline("classes")))


def trained(epochs: int = 2, guidance: float = 1.5) -> Recipe:
    """HQ-DM with little to do."""
    recipe = RECIPES["hq-dm"].having("distil", epochs=epochs, batch_size=3).having("calibrate_activations", samples=2)
    return recipe.set("sampler.num_inference_steps", 2).set("sampler.guidance_scale", guidance)


# ---- seconds ---------------------------------------------------------------------------------------------------------


def test_seconds_count_every_step_once(tmp_path: Path) -> None:
    """A pass that a step ran by itself beside it; a step that was killed by what all its processes logged."""
    recipe = RECIPES["rtn"].rotated(rotation("auto"))
    texts = [step_text(step) for step in recipe.steps]
    texts.insert(texts.index(step_text(rotation("auto"))), "insert_hadamard()")
    records = [PassRecord(text, (), (), 1.0) for text in texts]
    run = Run(tmp_path)
    assert _seconds(records, recipe, run) == len(recipe.steps) + 1
    update = asdict(Update(1, 1, 0, 1.0, 1.0, 1.0, 4.0))
    lines = [json.dumps({"of": len(recipe.steps), **update})] * 2
    run.log_path.write_text("\n".join(lines), encoding="utf-8")
    assert _seconds(records, recipe, run) == len(recipe.steps) + 8


# ---- entries ---------------------------------------------------------------------------------------------------------


def test_entries_by_name_with_and_without_the_rotation() -> None:
    entries = find_entries("rtn, rtn+hadamard,hq-dm,hq-dm-hadamard,rtn")
    assert [entry.name for entry in entries] == ["rtn", "rtn+hadamard", "hq-dm", "hq-dm-hadamard"]
    assert entries[1].recipe.steps == RECIPES["rtn"].rotated(rotation("sylvester")).steps
    assert entries[3].recipe.steps == RECIPES["hq-dm"].unrotated().steps
    assert entries[3].recipe.name == "hq-dm-hadamard"  # what the plan of its programs says


def test_all_entries() -> None:
    assert [entry.name for entry in find_entries("all")] == [*RECIPES, "rtn+hadamard"]


def test_an_entry_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe_yaml(replace(RECIPES["rtn"], name="My own")))
    (entry,) = find_entries(f"{file}+hadamard")
    assert (entry.name, entry.slug) == ("My own+hadamard", "my-own+hadamard")
    assert entry.recipe.rotates


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nothing", "unknown; there are"),
        ("rtn-hadamard", "has no rotation to leave out"),
        ("hq-dm+hadamard", "has that rotation already"),
        ("rtn,,hq-dm", "has an empty name"),
        ("", "has an empty name"),
    ],
)
def test_entries_that_are_refused(text: str, found: str) -> None:
    with pytest.raises(PlanError, match=found):
        find_entries(text)


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe_yaml(RECIPES["rtn"].rotated(rotation("sylvester"))))
    with pytest.raises(PlanError, match="has the name of another"):
        find_entries(f"rtn,{file}")


def plan_file(folder: Path, rules: str, bits: str = "") -> Path:
    """A plan file in a folder of its own."""
    folder.mkdir(exist_ok=True)
    file = folder / "found.yaml"
    file.write_text((f"bits: {bits}\n" if bits else "") + f"rules:\n- {rules}\n", encoding="utf-8")
    return file


def test_an_entry_with_a_plan(tmp_path: Path) -> None:
    narrow = plan_file(tmp_path / "a", "{pattern: conv_in, bits: w6a8, rotation: regular 16}", "w4a3")
    wide = plan_file(tmp_path / "b", "{pattern: conv_in, bits: w6a8}", "w4a4")
    entries = find_entries(f"rtn,rtn@{narrow},rtn@{wide},rtn@{wide}")
    assert [(entry.name, entry.slug, entry.plan.bits) for entry in entries] == [
        ("rtn", "rtn", ""),
        ("rtn@found", "rtn@found", "w4a3"),
        ("rtn@found", "rtn@found", "w4a4"),
    ]
    assert entries[1].recipe.rotates  # the plan's rules ask for it
    assert not entries[2].recipe.rotates
    assert [[entry.fits(bits) for bits in ("w4a4", "w4a3")] for entry in entries] == [[1, 1], [0, 1], [1, 0]]
    require_widths(entries, ("w4a3", "w4a4"))
    with pytest.raises(PlanError, match=r"found\.yaml: says bits w4a4, and w4a3 is asked for"):
        require_widths(entries, ("w4a3",))


def test_two_plans_of_one_row_are_refused(tmp_path: Path) -> None:
    one = plan_file(tmp_path / "a", "{pattern: conv_in, bits: w6a8}", "w4a4")
    other = plan_file(tmp_path / "b", "{pattern: conv_in, bits: w8a8}")
    with pytest.raises(PlanError, match="has the name of another"):
        find_entries(f"rtn@{one},rtn@{other}")


@pytest.mark.parametrize("text", ["rtn@", "@plan.yaml"])
def test_a_plan_without_recipe_or_file_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is no recipe with a plan"):
        find_entries(text)


def test_a_recipe_file_may_have_the_sign_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "a@b.yaml"
    file.write_text(recipe_yaml(replace(RECIPES["rtn"], name="mine")))
    assert [entry.name for entry in find_entries(str(file))] == ["mine"]


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluations of one sample by teacher and student; one that is differentiated counts two more."""
    count = [0]

    def count_call(sample: torch.Tensor, found: Any) -> Any:
        noise = found[0] if isinstance(found, tuple) else found  # with what losses ask for behind it
        count[0] += len(sample) * (3 if noise.requires_grad else 1)
        return found

    own_denoiser = taps.denoiser

    def denoiser(module: torch.nn.Module) -> Any:
        inner = own_denoiser(module)
        return lambda sample, *rest: count_call(sample, inner(sample, *rest))

    def watched(own: Any) -> Any:
        return lambda self, sample, *rest: count_call(sample, own(self, sample, *rest))

    monkeypatch.setattr(taps, "denoiser", denoiser)
    for watcher in (activations._Observer, site_rows._Watcher):
        monkeypatch.setattr(watcher, "__call__", watched(watcher.__call__))
    return count


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("name", ["rtn", "hq-dm", "weighed", "mixed", "mpq-dm"])
def test_the_declared_cost_is_what_is_used(
    made: SimpleNamespace, counted: list[int], name: str, guidance: float
) -> None:
    recipe = trained(guidance=guidance)
    if name == "rtn":
        recipe = recipe.untrained()
    elif name == "mpq-dm":
        short = {"updates": 3, "batch_size": 2}
        recipe = replace(RECIPES[name].having("distil", **short), sampler=recipe.sampler)
        for step in ("smooth", "mix_channel_bits", "calibrate_activations"):
            recipe = recipe.having(step, samples=3)
    elif name != "hq-dm":
        option = {"weighed": ("weighting", "effect"), "mixed": ("order", "mixed")}[name]
        recipe = recipe.having("distil", **dict([option]))
    request = Request("w4a4", timesteps=made.task.timesteps(2))
    run_recipe(made.program, recipe, request, Work(made.program, made.task, recipe.sampler))
    assert counted[0] == scaled(made.program, recipe, made.task, "w4a4", None).evaluations > 0


def test_the_default_budget_is_that_of_hq_dm(made: SimpleNamespace) -> None:
    budget = default_budget(made.program, made.task, "w4a4")
    assert budget == 16 * 2 * 20 + 4 * 600 * 8 * 2  # calibration, then 600 updates of 8 images with guidance
    found = scaled(made.program, RECIPES["hq-dm"], made.task, "w4a4", budget)
    assert found == Scaled(RECIPES["hq-dm"], budget, 1.0)


def test_a_budget_changes_the_updates_alone(made: SimpleNamespace) -> None:
    recipe = trained()  # calibration 2·2·2 = 8, 4 updates of 4·3·2 = 24
    found = scaled(made.program, recipe, made.task, "w4a4", 8 + 10 * 24 + 11)
    assert found.recipe == recipe.set("distil.updates", 10)
    assert (found.evaluations, found.factor) == (8 + 10 * 24, 2.5)
    assert scaled(made.program, recipe, made.task, "w4a4", 32).recipe.step("distil").updates == 1


@pytest.mark.parametrize("name", ["hqc", "q-diffusion", "quest", "tcaq-dm", "mpq-dmv2"])
def test_a_budget_is_met_whatever_stands_beside_the_iterations(made: SimpleNamespace, name: str) -> None:
    """Weighing, the collecting of samples and rounds cost the same however many updates follow."""
    recipe = RECIPES[name]
    own = scaled(made.program, recipe, made.task, "w4a4", None).evaluations
    least = [step if not hasattr(step, "total") else replace(step, updates=1) for step in recipe.steps]
    few = scaled(made.program, replace(recipe, steps=tuple(least)), made.task, "w4a4", None).evaluations
    budget = few + (own - few) / 3
    found = scaled(made.program, recipe, made.task, "w4a4", budget)
    assert found.evaluations == pytest.approx(budget, rel=0.02)  # of what one update more of every step costs
    assert found.factor == pytest.approx(1 / 3, abs=0.1)


def test_a_budget_below_one_iteration_is_refused(made: SimpleNamespace) -> None:
    with pytest.raises(PlanError, match="needs 32 evaluations with one iteration a step"):
        scaled(made.program, trained(), made.task, "w4a4", 31)


def test_a_recipe_without_iterations_is_not_scaled(made: SimpleNamespace) -> None:
    recipe = trained().untrained()
    assert scaled(made.program, recipe, made.task, "w4a4", 1e9) == Scaled(recipe, 8, None)
    assert [iterates(one) for one in (recipe, trained())] == [False, True]


# ---- seeds -----------------------------------------------------------------------------------------------------------


def test_a_seed_is_added_to_every_seed_of_a_recipe() -> None:
    found = seeded(RECIPES["hq-dm"], 2)
    seeds = [found.step(name).seed for name in ("calibrate_activations", "attach_lora", "distil")]
    assert seeds == [2026, 3409, 3409]
    assert seeded(RECIPES["hq-dm"], 0) == RECIPES["hq-dm"]


def protocol(images: int = 3, **options: Any) -> Protocol:
    return Protocol(images, (0, 1), SAMPLER, 40, "DDIMScheduler", **options)


def test_image_seeds_are_of_the_seed_alone() -> None:
    assert protocol().seeds(2) == (2000, 2001, 2002)
    assert protocol().labels(3) == (0, 1, 0)
    assert not set(protocol(1000).seeds(0)) & set(protocol(1000).seeds(1))


# ---- ranks and tables ------------------------------------------------------------------------------------------------


def row(name: str, fids: list[float | None], bits: str = "w4a4", **more: Any) -> Row:
    """A row with one FID a seed; None is a seed that failed."""
    figures = {
        seed: {
            "fid_reference": fid,
            "psnr_db": 30.0 - fid,
            "size_bytes": 2e6,
            "file_bytes": 2_500_000,
            "evaluations": 640.0,
            "seconds": 3.0,
            "export_refused": None,
            "integer_sites": 5,
            "sites": 6,
            "factor": None,
            "export_error": 2e-7,
            "trajectory": {
                "timesteps": [50.0, 0.0],
                "gain_by_timestep": [1.01, None],
                "latent_cosine_by_timestep": [1.0, 0.99],
            },
            **more,
        }
        for seed, fid in enumerate(fids)
        if fid is not None
    }
    errors = {seed: "it broke" for seed, fid in enumerate(fids) if fid is None}
    return Row(name, "ptq", bits, figures, errors)


def ranks(rows: list[Row], key: str = FID) -> list[tuple[str, int | None]]:
    return [(one.name, one.rank) for one in ranked(rows, key)]


def test_ranks_by_mean_and_ties_within_one_deviation() -> None:
    near = row("near", [1.0, 1.2])  # 1.1 ± 0.14
    tied, next_, far = row("tied", [1.21, 1.21]), row("next", [1.3, 1.3]), row("far", [9.0, 9.0])
    assert ranks([far, next_, tied, near]) == [("near", 1), ("tied", 1), ("next", 3), ("far", 4)]


def test_ties_are_with_the_best_of_a_rank_and_do_not_chain() -> None:
    rows = [row(name, [mean - 0.05, mean + 0.05]) for name, mean in (("a", 1.0), ("b", 1.06), ("c", 1.12))]
    assert ranks(rows) == [("a", 1), ("b", 1), ("c", 3)]  # deviations of 0.07


def test_single_seeds_tie_only_where_they_are_equal() -> None:
    assert ranks([row("a", [1.0]), row("b", [1.0]), row("c", [1.001])]) == [("a", 1), ("b", 1), ("c", 3)]


def test_ranks_are_of_one_width_and_failed_rows_come_last() -> None:
    rows = [row("broken", [None]), row("a", [2.0]), row("b", [1.0], "w4a3"), row("c", [1.0])]
    assert ranks(rows) == [("c", 1), ("a", 2), ("broken", None), ("b", 1)]


def test_a_higher_psnr_is_the_better_one_and_identical_images_are_the_best() -> None:
    same = row("same", [0.0], psnr_db=None)
    assert ranks([row("a", [2.0]), row("b", [1.0]), same], PSNR) == [("same", 1), ("b", 2), ("a", 3)]


def comparison(rows: list[Row], **options: Any) -> Comparison:
    return Comparison("digits.hqc", ranked(rows, FID), 2, FID, 8_000_000, ("Protocol: x.",), **options)


def test_the_table() -> None:
    text = markdown(comparison([row("a|b", [1.0, 2.0]), row("c", [1.0, None])]))
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").replace("\\|", "¦").split("|")] for line in lines[2:7]]
    head, _, of_float, first, second = (dict(zip(cells[0], one, strict=True)) for one in cells)
    assert list(head)[:7] == ["rank by FID", "recipe", "kind", "bits", "MB by bits", "file MB", "PSNR, dB"]
    assert (of_float["recipe"], of_float["MB by bits"], of_float["PSNR, dB"]) == ("float", "8.00", "∞")
    assert (first["MB by bits"], first["file MB"], of_float["file MB"]) == ("2.00", "2.50", "–")
    assert (first["recipe"], first["seeds"], first["error"]) == ("c", "1 of 2", "it broke")
    assert second["recipe"] == "a¦b"
    assert (second["FID to float"], second["integer sites in ORT"]) == ("1.500 ± 0.707", "5 of 6")
    assert (second["evaluations"], second["export error"], second["seconds"]) == ("640", "2.0e-07", "3")
    assert lines[-2:] == ["- c w4a4, seed 1 failed: it broke", "- Protocol: x."]
    assert "IS" not in head  # nobody has one


def test_cells_from_before_files_were_measured_are_read() -> None:
    old = row("a", [1.0])
    old = replace(old, figures={0: {k: v for k, v in old.figures[0].items() if k != "file_bytes"}})
    found = Row.from_dict(json.loads(json.dumps(old.to_dict())))
    assert "file MB" not in markdown(comparison([found]))
    assert (found.has_file, found.megabytes) == (False, 2.0)
    assert (row("b", [1.0]).has_file, row("b", [1.0]).megabytes) == (True, 2.5)


def test_cells_of_two_machines_are_put_together() -> None:
    first = comparison([row("a", [1.0, None]), row("b", [1.5])], data={"protocol": {"images": 3}})
    more = comparison([row("a", [1.0, 3.0]), row("b", [9.0], "w4a3")], data={"protocol": {"images": 3}})
    found = merged(first, more)
    assert [(one.bits, one.name, one.rank, list(one.figures)) for one in found.rows] == [
        ("w4a4", "b", 1, [0]),
        ("w4a4", "a", 1, [0, 1]),  # 2 ± 1.4
        ("w4a3", "b", 1, [0]),
    ]
    assert not found.failed  # what failed there was made here
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ArtefactError, match="differ in protocol"):
        merged(first, comparison([], data={"protocol": {"images": 4}}))


def test_an_export_that_is_refused_says_why() -> None:
    refused = row("a", [1.0], export_refused="target onnxruntime: takes no x", export_error=None, integer_sites=None)
    assert "| none: target onnxruntime: takes no x |" in markdown(comparison([refused]))


def test_the_notes_name_protocol_budgets_and_factors() -> None:
    found = [("hq-dm", Scaled(RECIPES["hq-dm"], 39040.0, 1.0)), ("rtn", Scaled(RECIPES["rtn"], 640.0, None))]
    text = " ".join(notes_of(protocol(why_unscored="no classifier"), 2, "noise", Budgets(39040.0, None, True), found))
    assert "DDIMScheduler, 2 steps, η 0, guidance 1.5; 3 images, seeds 0–2, 1000–1002" in text
    assert "Budget of qat: 39 040, what hq-dm costs on this program. hq-dm: 1.00 × its iterations." in text
    assert "IS, FID and accuracy are left out: no classifier." in text
    assert "rtn:" not in text


def test_the_page_needs_nothing_else_and_escapes_names() -> None:
    text = page(comparison([row("<b>a</b>", [1.0, 2.0])]))
    assert "<b>a</b>" not in text
    assert text.count("<svg") == 1
    assert "http-equiv" in text
    for outside in ("<script", "<link", 'src="http', "@import"):
        assert outside not in text
    assert page(comparison([row("<b>a</b>", [1.0, 2.0])])) == text


def test_the_page_of_rows_that_all_failed() -> None:
    assert "it broke" in page(comparison([row("a", [None])]))


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_true_bytes_count_codes_at_their_bits(made: SimpleNamespace) -> None:
    recipe = trained()
    request = Request("w3a4", timesteps=made.task.timesteps(2))
    work = Work(made.program, made.task, recipe.sampler)
    quantised = run_recipe(made.program, recipe.untrained(), request, work)
    with_lora = run_recipe(made.program, recipe.having("distil", updates=1), request, work)
    assert true_bytes(quantised) == true_bytes(with_lora)
    by_hand = sum(_bytes(quantised, name) for name in quantised.state)
    assert true_bytes(quantised) == by_hand < made.program.size_bytes() / 2
    assert true_bytes(made.program) == made.program.size_bytes()


@pytest.mark.parametrize("weight", ["symmetric", "mixed"])
def test_weight_bytes_by_bits_and_in_files(weight: str, made: SimpleNamespace) -> None:
    """Symmetric three-bit codes lie in half a byte; asymmetric ones may need a whole one."""
    ranges = InsertQdq((0.0,), activation="asymmetric", weight=weight)
    quantised = run_pipeline(made.program, [SelectLayers(rules="default", bits="w3a4"), ranges])
    counts = {plan.site: quantised.state[f"{plan.site}.weight"].numel() for plan in quantised.plan.quantised}
    narrow = {plan.site for plan in quantised.plan.quantised if plan.weight_bits == 3}
    assert 0 < len(narrow) < len(counts)
    by_bits = sum(count * (3 if site in narrow else 8) / 8 for site, count in counts.items())
    frozen = run_pipeline(quantised, [FreezeIntegers()])
    packed = run_pipeline(frozen, [PackInt4()])
    kept = sum(t.numel() for key, t in packed.state.items() if key.endswith((".weight_codes", ".weight_packed")))
    assert weight_bytes(frozen) == weight_bytes(packed) == (by_bits, kept)
    assert weight_bytes(quantised)[0] == by_bits
    assert (weight_bytes(quantised)[1] == kept) or weight == "mixed"
    assert kept <= weight_bytes(quantised)[1] <= sum(counts.values())


@pytest.mark.parametrize("steps", [(InsertSmoothing(),), (InsertHadamard(weights=True),)], ids=lambda s: str(s[0]))
def test_true_bytes_know_weights_by_any_name(made: SimpleNamespace, steps: tuple[Pass, ...]) -> None:
    """Steps that change a weight give it another name."""
    chains = [(SelectLayers(bits="w3a4"), *more, InsertQdq((0.0,))) for more in ((), steps)]
    plain, changed = (run_pipeline(made.program, chain) for chain in chains)
    extra = sum(4 * t.numel() for name, t in changed.state.items() if name.endswith(".smoothing"))
    assert not any(f"{plan.site}.weight" in changed.state for plan in changed.plan.sites if plan.block or plan.smoothed)
    assert true_bytes(changed) == true_bytes(plain) + extra


def _bytes(program: Program, name: str) -> float:
    tensor = program.state[name]
    site, _, leaf = name.rpartition(".")
    plan = next((one for one in program.plan.quantised if one.site == site), None)
    if plan is not None and leaf == "weight":
        return tensor.numel() * (plan.weight_bits or 32) / 8
    return tensor.numel() * tensor.element_size()


def test_images_are_read_as_they_were_written(tmp_path: Path) -> None:
    torch.manual_seed(3)
    samples = Samples(
        torch.rand(2, 1, 4, 4), torch.randn(2, 4, 2, 2), (1, 2), (0, 1), SamplingProtocol("DDIM", 2, 1.5, 0.0)
    )
    at_gain_1 = replace(samples, images=torch.rand(2, 1, 4, 4), latents=torch.randn(2, 4, 2, 2))
    save_drawn(Drawn(samples, at_gain_1, {"gain": 1.0}), tmp_path / "x")
    found = load_drawn(tmp_path / "x")
    assert found.samples.images.equal(samples.images)
    assert found.samples.latents is not None
    assert samples.latents is not None
    assert found.samples.latents.equal(samples.latents)
    assert replace(found.samples, images=samples.images, latents=samples.latents) == samples
    assert found.at_gain_1 is not None
    assert found.at_gain_1.images.equal(at_gain_1.images)
    assert found.trajectory == {"gain": 1.0}


def test_a_work_folder_is_of_one_program(tmp_path: Path) -> None:
    record = Record(tmp_path / "w", {"graph.json": "1"})
    record.check()
    record.begin()
    Record(tmp_path / "w", {"graph.json": "1"}).check()
    with pytest.raises(ArtefactError, match="is the work folder of another program"):
        Record(tmp_path / "w", {"graph.json": "2"}).check()


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', '{"format": "hqc-comparison"}'])
def test_a_record_that_is_not_ours_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(ArtefactError, match="is not one that hqc wrote"):
        Record(tmp_path, {}).check()


def test_an_output_is_replaced_while_nobody_has_changed_it(tmp_path: Path) -> None:
    record, output = Record(tmp_path / "w", {}), tmp_path / "table.md"
    output.write_text("mine")
    with pytest.raises(ArtefactError, match="already exists"):
        record.check_output(output, force=False)
    record.check_output(output, force=True)
    record.write(output, b"one")
    record.write(output, b"two")
    Record(tmp_path / "w", {}).check_output(output, force=False)
    output.write_bytes(b"one")  # killed before the second was written
    Record(tmp_path / "w", {}).check_output(output, force=False)
    output.write_text("mine")
    with pytest.raises(ArtefactError, match="already exists"):
        Record(tmp_path / "w", {}).check_output(output, force=False)
    assert json.loads((tmp_path / "w" / "comparison.json").read_text())["format"] == "hqc-comparison"


def test_a_stage_that_measures_depends_on_the_code_that_does() -> None:
    assert fingerprint("x", {"a": 1}) != fingerprint("x", {"a": 1}, measures=True)
    assert fingerprint("x", {"a": 1}) == fingerprint("x", {"a": 1}) != fingerprint("x", {"a": 2})
