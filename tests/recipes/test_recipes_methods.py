"""Every method end to end on a tiny pipeline: what it changes, that it resumes, and that its export equals it."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from tiny_pipeline import traced_pipeline

import hqc
from hqc import api
from hqc.calibration import Smooth
from hqc.checkpoint import Checkpoint
from hqc.errors import ExportError
from hqc.evaluation.comparison.size import true_bytes, weight_bytes
from hqc.export.reference import without_quantisers
from hqc.passes import DropSingleKeyAttention, FreezeIntegers, MergeLora, PackInt4
from hqc.pipeline import run_pass, run_pipeline
from hqc.program import Program, Stage
from hqc.recipes import RECIPES, Recipe
from hqc.recipes.known import STEPS
from hqc.recipes.run import Request, planned
from hqc.runtimes.integer.forms import integer_form
from hqc.sampling import Update
from hqc.sites import watched_sites
from hqc.storage import load_program, save_program

SHORT = {"sampler.num_inference_steps": 3, "calibrate_activations.samples": 2, "calibrate_activations.candidates": 10}
TRAINED = {"distil.updates": 7, "distil.batch_size": 2, "distil.checkpoint_every": 2, "attach_lora.rank": 2}
FEW = {
    "choose_rotation": {"samples": 1, "timesteps": 2},
    "smooth": {"samples": 1, "timesteps": 2, "rows": 16, "candidates": 3},
    "decompose": {"samples": 1, "timesteps": 2, "rows": 16, "rounds": 3, "candidates": 20},
    "mix_channel_bits": {"samples": 1, "timesteps": 2, "rows": 8},
    "reconstruct": {"samples": 1, "timesteps": 3, "iterations": 8, "batch_size": 2},
    "learn_factors": {"updates": 5, "batch_size": 2, "checkpoint_every": 2},
    "learn_bounds": {"updates": 5, "batch_size": 2, "checkpoint_every": 2},
    "choose_softmax": {"samples": 1},
    "fit_lookup": {"samples": 1, "timesteps": 2, "rows": 32, "rounds": 2},
}
QAT = [name for name, recipe in RECIPES.items() if recipe.kind == "qat"]


@pytest.fixture(scope="module")
def program() -> Program:
    return traced_pipeline("classes")


@pytest.fixture(scope="module")
def quantised(program: Program) -> dict[str, Program]:
    return {name: api.quantise(program, _short(name), "w4a4") for name in RECIPES}


def _short(name: str) -> Recipe:
    found = RECIPES[name]
    found = api.recipe_of(found, {k: v for k, v in SHORT.items() if found.step(k.partition(".")[0]) or "sampler" in k})
    if found.sampler.timestep is not None:
        found = found.set("sampler.timestep", 99)  # the pipeline was trained on a hundred
    for step, options in FEW.items():
        found = found.having(step, **options) if found.step(step) is not None else found
    if name == "svdquant-grouped":
        found = found.set("decompose.candidates", 1)
    if found.step("distil") is None:
        return found
    return api.recipe_of(found, {path: n for path, n in TRAINED.items() if found.step(path.partition(".")[0])})


@pytest.mark.parametrize("name", RECIPES)
def test_it_calibrates_and_trains_what_it_says(quantised: dict[str, Program], name: str) -> None:
    result = quantised[name]
    assert result.plan.recipe == name
    assert result.stage == (Stage.TRAINED if name in QAT else Stage.QUANTISED)
    tables = [t for key, t in result.state.items() if key.endswith("activation_scale_table")]
    static = [plan for plan in result.plan.quantised if not plan.activation_group]
    assert bool(static) == (name not in ("ganq", "svdquant-grouped"))
    assert len(list(watched_sites(result))) >= len(result.plan.quantised)
    assert len(tables) > 10 or not static
    assert len(tables) == len(static) + sum(one.quantisers for one in result.plan.attentions)
    assert all(bool((table != 1).any()) for table in tables)
    learnt = [key for key, t in result.state.items() if key.endswith("lora_b") and bool(t.any())]
    assert bool(learnt) == (RECIPES[name].step("attach_lora") is not None)


@pytest.mark.parametrize("name", RECIPES)
def test_its_export_equals_it(quantised: dict[str, Program], name: str, tmp_path: Path) -> None:
    result = quantised[name]
    target = "portable" if name == "svdquant-grouped" else "onnxruntime"
    hqc.export_program(result, target, tmp_path / "x")  # verifies every site and the whole network
    session, args = hqc.load(tmp_path / "x").session, result.example_inputs(3, seed=4)
    wanted = result.module()(*args)
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(session(*args), wanted, strict=True)]
    # Float rounding, or where a code flipped for it: a share of what one code of one site does; where scales are of
    # the values themselves, every code behind it may flip too.
    assert min(errors) < 1e-4 or name != "svdquant-grouped"
    assert max(errors) < (0.02 if name != "svdquant-grouped" else 0.1)


# What efficientdm learns, hqc and mpq-dm learn too.
@pytest.mark.parametrize(
    "name", [pytest.param("efficientdm", marks=pytest.mark.long), "hqc", "mpq-dm", "mpq-dmv2", "passionsr"]
)
def test_it_resumes_to_the_same_bits(
    program: Program, quantised: dict[str, Program], name: str, tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def stop(update: Update) -> None:
        if update.step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        api.quantise(program, _short(name), "w4a4", work_dir=tmp_path / "run", on_update=stop)
    found = api.quantise(program, _short(name), "w4a4", work_dir=tmp_path / "run", resume=True)
    wanted = quantised[name]
    assert all(torch.equal(tensor, wanted.state[key]) for key, tensor in found.state.items())


def test_passionsr_resumes_in_its_second_stage(program: Program, quantised: dict[str, Program], tmp_path: Path) -> None:
    """Behind a checkpoint of the boundaries: what the first stage has learnt is not learnt again."""

    class Interrupted(Exception):
        pass

    begun: list[int] = []

    def stop(update: Update) -> None:
        begun.append(update.step)
        if begun.count(1) == 2 and update.step == 4:
            raise Interrupted

    again: list[int] = []
    with pytest.raises(Interrupted):
        api.quantise(program, _short("passionsr"), "w4a4", work_dir=tmp_path / "run", on_update=stop)
    assert begun == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    heard = {"on_update": lambda update: again.append(update.step)}
    found = api.quantise(program, _short("passionsr"), "w4a4", work_dir=tmp_path / "run", resume=True, **heard)
    assert again == [3, 4, 5]
    wanted = quantised["passionsr"]
    assert found.state.keys() == wanted.state.keys()
    assert all(torch.equal(tensor, wanted.state[key]) for key, tensor in found.state.items())


def test_efficientdm_is_asymmetric_where_codes_fit(quantised: dict[str, Program]) -> None:
    result = quantised["efficientdm"]
    for plan in result.plan.quantised:
        narrow = plan.activation_bits == 4
        assert (plan.activation_symmetric, plan.weight_symmetric) == (not narrow, not narrow), plan.site
        assert plan.block == 0
    zeros = [t for key, t in result.state.items() if key.endswith("activation_zero_table")]
    assert len({float(z) for table in zeros for z in table}) > 3
    assert not any(key.endswith("zero_table") for key in quantised["hq-dm"].state)


def test_zero_points_stay_where_they_learn(program: Program) -> None:
    """At a rate that throws them far out they stop at the ends of 0 … 15."""
    recipe = _short("efficientdm").with_rate("activation_zero_table", 100.0)
    result = api.quantise(program, recipe, "w4a4")
    tables = [t for key, t in result.state.items() if key.endswith("activation_zero_table")]
    assert {float(table.min()) for table in tables} | {float(table.max()) for table in tables} >= {0.0, 15.0}
    assert all(0 <= float(z) <= 15 for table in tables for z in table)


def test_mpq_dm_mixes_the_bits_of_channels(quantised: dict[str, Program]) -> None:
    result, changed = quantised["mpq-dm"], []
    for plan in result.plan.quantised:
        narrow = plan.weight_bits == 4
        assert (plan.weight_mixed, plan.smoothed, plan.activation_symmetric) == (narrow, narrow, not narrow), plan.site
        if not narrow:
            continue
        top, zero = (result.state[f"{plan.site}.weight_{leaf}"] for leaf in ("top", "zero"))
        bits = (top + 1).log2()
        assert float(bits.mean()) == 4
        assert set(bits.tolist()) <= {3.0, 4.0, 5.0}
        assert bool(((zero >= 0) & (zero <= top)).all())
        more = int((bits == 5).sum())
        note = f"{more} of {len(bits)} channels with a bit more, {more} with one less"
        assert (note if more else f"all {len(bits)} channels with 4 bits") in plan.reason
        changed.append(more)
        assert bool((result.state[f"{plan.site}.smoothing"] != 1).any())
    assert len(set(changed)) > 1
    assert any(bool((t != t.round()).any()) for key, t in result.state.items() if key.endswith("weight_zero"))


def test_mpq_dmv2_has_binary_codes_beside_salient_channels(quantised: dict[str, Program]) -> None:
    result, counts = quantised["mpq-dmv2"], set()
    for plan in result.plan.quantised:
        narrow = plan.weight_bits == 4
        assert (plan.weight_residual, plan.smoothed, plan.activation_symmetric) == (narrow, narrow, not narrow)
        if not narrow:
            continue
        top, salient = (result.state[f"{plan.site}.weight_{leaf}"] for leaf in ("top", "salient"))
        bits = (top + 1).log2() + salient
        assert (float(bits.mean()), set(bits.tolist()) <= {3.0, 4.0, 5.0}) == (4, True)
        counts.add(int(salient.sum()))
    assert len(counts) > 1
    frozen = run_pipeline(result, [MergeLora(), FreezeIntegers()], check_numerics=True)
    beside = [plan.site for plan in frozen.plan.sites if plan.site.endswith(":residual")]
    salient = [key for key, t in result.state.items() if key.endswith("weight_salient") and bool(t.any())]
    assert beside == [key.replace(".weight_salient", ":residual") for key in salient]
    assert weight_bytes(frozen)[0] == weight_bytes(result)[0] < weight_bytes(frozen)[1]


def test_passionsr_learns_factors_shifts_and_boundaries(program: Program, quantised: dict[str, Program]) -> None:
    """One call at one timestep: static scales; what is folded keeps the float numbers."""
    result = quantised["passionsr"]
    assert result.plan.timesteps == (99.0,)
    untrained = api.quantise(program, _short("passionsr").untrained(), "w4a4")
    moved = {"smoothing": 0, "shift": 0, "weight_scale": 0, "activation_scale_table": 0}
    for plan in result.plan.quantised:
        assert plan.smoothed == plan.trained, plan.site
        pointwise = plan.kind == "linear" or plan.site.endswith(("proj_in", "proj_out"))
        assert plan.shifted == (plan.smoothed and pointwise), plan.site
        for leaf in moved:
            tensor = result.state.get(f"{plan.site}.{leaf}")
            moved[leaf] += tensor is not None and not torch.equal(tensor, untrained.state[f"{plan.site}.{leaf}"])
    assert min(moved.values()) > 10, moved
    plain, args = without_quantisers(result), program.example_inputs(2, seed=3)
    assert plain is not None
    torch.testing.assert_close(plain.module()(*args), program.module()(*args), rtol=1e-3, atol=1e-4)


def test_ganq_takes_its_weights_from_tables(program: Program, quantised: dict[str, Program]) -> None:
    result, rounded = quantised["ganq-int8"], quantised["rtn"]
    tables = [plan for plan in result.plan.quantised if plan.weight_lookup]
    assert {plan.site for plan in tables} == {plan.site for plan in result.plan.quantised if plan.weight_bits == 4}
    frozen = run_pass(result, FreezeIntegers())
    for plan in tables:
        codes = frozen.state[f"{plan.site}.weight_codes"].flatten(1)
        assert max(len(row.unique()) for row in codes) <= 16, plan.site
        assert int(codes.to(torch.int32).abs().max()) <= 127
        # What is stored is what the codes say: nothing is rounded a second time.
        scale = result.state[f"{plan.site}.weight_scale"].unsqueeze(1)
        torch.testing.assert_close(codes * scale, result.state[f"{plan.site}.weight"].flatten(1), rtol=1e-6, atol=0)
    assert any(int(frozen.state[f"{plan.site}.weight_codes"].to(torch.int32).abs().max()) > 8 for plan in tables)
    args = result.example_inputs(8, seed=9)
    wanted = program.module()(*args)
    errors = [float((one.module()(*args) - wanted).norm()) for one in (result, rounded)]
    assert errors[0] != errors[1]
    assert true_bytes(result) - true_bytes(rounded) == sum(16 * plan.out_channels for plan in tables)


@pytest.mark.parametrize("target", ["portable", "tensorrt"])
@pytest.mark.parametrize("name", ["mpq-dm", "mpq-dmv2", "ganq-int8", "passionsr", "tcaq-dm", "q-diffusion"])
def test_in_the_other_targets(quantised: dict[str, Program], name: str, target: str, tmp_path: Path) -> None:
    """Codes and outputs of every site are verified; ONNX Runtime is among the tests of all methods, ganq below."""
    result = quantised[name]
    options = {"tensorrt": hqc.TensorRtOptions(dtype="fp32")} if target == "tensorrt" else {}  # without a twin
    report = hqc.export_program(result, target, tmp_path / "x", **options)
    watched = result.plan.quantised if target == "tensorrt" else list(watched_sites(result))
    assert len(report.verification.sites) == len(watched)
    assert bool(report.attention) == bool(result.plan.attentions)


def test_ganq_leaves_activations_float(program: Program, quantised: dict[str, Program], tmp_path: Path) -> None:
    result = quantised["ganq"]
    tables = [plan for plan in result.plan.sites if plan.weight_only]
    assert {plan.widths for plan in result.plan.sites} == {"w4~a16", "float"}
    assert len(tables) > 10
    assert not [node for node in result.graph.nodes if "quant" in str(node.target)]
    frozen = run_pipeline(result, [FreezeIntegers(), PackInt4()], check_numerics=True)
    args = result.example_inputs(3, seed=4)
    assert torch.equal(frozen.module()(*args), result.module()(*args))  # the very floats
    for plan in tables:
        weight, table = result.state[f"{plan.site}.weight"].flatten(1), frozen.state[f"{plan.site}.weight_table"]
        assert table.shape == (plan.out_channels, 16)
        assert all(set(row.tolist()) == set(own.tolist()) for row, own in zip(weight, table, strict=True))
        assert f"{plan.site}.weight_packed" in frozen.state
        assert not torch.equal(weight, program.state[f"{plan.site}.weight"].flatten(1))
    assert true_bytes(frozen) == true_bytes(result)
    assert weight_bytes(frozen)[0] == weight_bytes(result)[0] == weight_bytes(frozen)[1]
    save_program(frozen, tmp_path / "frozen.hqc")
    assert load_program(tmp_path / "frozen.hqc").plan == frozen.plan


def test_ganq_files_hold_four_bits_a_weight(quantised: dict[str, Program], tmp_path: Path) -> None:
    result = quantised["ganq"]
    names = {plan.site for plan in result.plan.sites if plan.weight_only}
    for target in ("portable", "onnxruntime"):
        hqc.export_program(result, target, tmp_path / target)
        graph = onnx.load(str(tmp_path / target / "model.onnx"), load_external_data=False).graph
        packed = {
            t.name.removesuffix(".weight_packed") for t in graph.initializer if t.data_type == onnx.TensorProto.INT4
        }
        assert packed == names
        assert [n.op_type for n in graph.node].count("GatherElements") == len(names)
    hqc.export_program(result, "tensorrt", tmp_path / "tensorrt")
    layers = json.loads((tmp_path / "tensorrt" / "report.json").read_text())["layers"]
    said = {layer["site"]: (layer["form"], layer["reason"]) for layer in layers}
    assert all(said[name][0] == "float" and "activations stay float" in said[name][1] for name in names)
    with pytest.raises(ExportError, match="has a weight of a table of real numbers, which no integer product takes"):
        integer_form(result)


def test_convrot_rotates_weights_too(quantised: dict[str, Program]) -> None:
    double, single, mixed = (quantised[name].plan for name in ("convrot", "convrot-single", "convrot-mixed"))
    rotated = [plan for plan in double.sites if plan.block]
    assert len(rotated) > 5
    assert all(plan.rotation == "regular" and plan.weight_rotated for plan in rotated)
    assert all(plan.rotation == "regular" and not plan.weight_rotated for plan in single.sites if plan.block)
    assert {plan.block for plan in single.sites} == {0, 16}
    values = [plan for plan in mixed.sites if plan.site.endswith((".to_v", ".to_out.0"))]
    assert values
    assert all((plan.weight_bits, plan.activation_bits) == (8, 8) for plan in values)


def test_svdquant_splits_every_site_of_the_asked_bits(program: Program, quantised: dict[str, Program]) -> None:
    result = quantised["svdquant"]
    split = [plan for plan in result.plan.quantised if plan.branch_rank]
    assert {plan.kind for plan in split} == {"conv2d", "linear"}
    for plan in result.plan.quantised:
        assert plan.smoothed == bool(plan.branch_rank) == (plan.weight_bits == 4), plan.site
    for plan in split:
        assert plan.branch_rank == 8, "32, a quarter of 32 channels at most"
        assert "weight error" in plan.reason
        assert bool(result.state[f"{plan.site}.branch_up"].any())
        assert not bool((result.state[f"{plan.site}.smoothing"] == 1).all()), plan.site
    args = program.example_inputs(2)
    wanted = program.module()(*args)
    torch.testing.assert_close(without_quantisers(result).module()(*args), wanted, rtol=1e-3, atol=1e-3)
    # True bits: codes, and the branch and the factors as they are stored.
    plain = true_bytes(quantised["rtn"])
    beside = sum(4 * t.numel() for n, t in result.state.items() if "branch_" in n or n.endswith(".smoothing"))
    assert true_bytes(result) == plain + beside


def test_svdquant_grouped_is_the_paper_s(program: Program, quantised: dict[str, Program], tmp_path: Path) -> None:
    result, other = quantised["svdquant-grouped"], quantised["svdquant"]
    assert [plan.site for plan in result.plan.quantised] == [plan.site for plan in other.plan.quantised]
    for plan in result.plan.quantised:
        assert plan.widths in ("w4g64a4g64", "w8g64a8g64")
        scale = result.state[f"{plan.site}.weight_scale"]
        assert scale.shape[:2] == (plan.out_channels, -(-plan.in_channels // 64))
        assert plan.smoothed == bool(plan.branch_rank) == (plan.weight_bits == 4), plan.site
    args = program.example_inputs(8, seed=3)
    wanted = program.module()(*args)
    torch.testing.assert_close(without_quantisers(result).module()(*args), wanted, rtol=1e-3, atol=1e-3)
    errors = [float((one.module()(*args) - wanted).norm()) for one in (result, other)]
    assert errors[0] < errors[1]
    save_program(result, tmp_path / "x.hqc")
    assert load_program(tmp_path / "x.hqc").plan == result.plan
    for target in ("onnxruntime", "tensorrt"):
        with pytest.raises(ExportError, match=r"scales of groups or of the values themselves\. Use target portable"):
            hqc.export_program(result, target, tmp_path / target)


@pytest.mark.parametrize("killed_in", ["decompose", "calibrate_activations"])
def test_svdquant_goes_on_after_its_last_long_step(
    program: Program, quantised: dict[str, Program], killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def killed(*_: object) -> None:
        raise Killed

    ran: list[str] = []
    kind = STEPS[killed_in]
    with monkeypatch.context() as patch:
        patch.setattr(kind, "run", killed)
        with pytest.raises(Killed):
            api.quantise(program, _short("svdquant"), "w4a4", work_dir=tmp_path / "run")
    kept = [path.name for path in (tmp_path / "run").glob("*.hqc")]
    assert kept == [{"decompose": "05-smooth.hqc", "calibrate_activations": "08-decompose.hqc"}[killed_in]]
    smooth = Smooth.run
    monkeypatch.setattr(Smooth, "run", lambda *given: (ran.append("smooth"), smooth(*given))[1])
    found = api.quantise(program, _short("svdquant"), "w4a4", work_dir=tmp_path / "run", resume=True)
    assert not ran
    wanted = quantised["svdquant"]
    assert found.state.keys() == wanted.state.keys()
    assert all(torch.equal(tensor, wanted.state[key]) for key, tensor in found.state.items())
    assert found.plan.sites == wanted.plan.sites


def test_hqc_chooses_its_rotations(quantised: dict[str, Program]) -> None:
    plan = quantised["hqc"].plan
    assert len({(site.rotation, site.block) for site in plan.sites}) > 2
    assert any(site.reason.startswith("rotation by output error: ") for site in plan.sites)


def test_q_diffusion_splits_shortcuts_and_has_one_scale_a_tensor(
    program: Program, quantised: dict[str, Program]
) -> None:
    result = quantised["q-diffusion"]
    parts = [plan for plan in result.plan.quantised if ":" in plan.site]
    assert {plan.site.partition(":")[0].rpartition(".")[2] for plan in parts} == {"conv_shortcut"}
    assert len(parts) == 4
    assert {plan.widths for plan in parts} == {"w4a4*"}
    tables = [t for key, t in result.state.items() if key.endswith(("_scale_table", "_zero_table"))]
    assert {len(table) for table in tables} == {1}
    assert len(result.plan.timesteps) == 3
    plain = api.quantise(program, _short("q-diffusion").without("reconstruct"), "w4a4")
    learnt = {key.rpartition(".")[2] for key, t in result.state.items() if not torch.equal(t, plain.state[key])}
    assert learnt >= {"weight", "activation_scale_table"}
    off = [
        key for key, t in result.state.items() if key.endswith("weight_scale") and not torch.equal(t, plain.state[key])
    ]
    assert off == []


def test_q_diffusion_quantises_attention_unless_told_not_to(program: Program, quantised: dict[str, Program]) -> None:
    result = quantised["q-diffusion"]
    assert [str(plan) for plan in result.plan.attentions] == ["q, k and v a4*, softmax a8"] * 3
    of_softmax = [t for key, t in result.state.items() if "attention_softmax" in key]
    assert sorted(t.tolist() == [0.0] for t in of_softmax) == [False] * 3 + [True] * 3  # a scale, and even steps
    left = {"insert_attention_qdq.softmax_bits": 0, "insert_attention_qdq.operands": "float"}
    plain = planned(program, api.recipe_of("q-diffusion", left), Request("w4a4"), calibrated=False)
    assert plain.plan.attentions == ()
    attention = torch.ops.aten.scaled_dot_product_attention.default
    dropped = run_pass(program, DropSingleKeyAttention())
    kept = [[node.name for node in one.graph.nodes if node.target is attention] for one in (plain, dropped)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 3


def test_tcaq_dm_quantises_the_softmax_of_every_attention(program: Program, quantised: dict[str, Program]) -> None:
    result = quantised["tcaq-dm"]
    assert len(result.plan.attentions) == 3  # the three over one key are gone
    assert {str(plan) for plan in result.plan.attentions} == {"q, k and v float, softmax a8"}
    kinds = {key: t for key, t in result.state.items() if key.endswith("log2_table")}
    assert len(kinds) == 3
    assert all(len(t) == 3 and set(t.tolist()) <= {0.0, 1.0} for t in kinds.values())  # three timesteps
    scales = [t for key, t in result.state.items() if key.endswith("attention_softmax.activation_scale_table")]
    assert all(bool(((t > 1e-4) & (t <= 1 / 255)).all()) for t in scales)
    smoothed = [plan for plan in result.plan.quantised if plan.smoothed]
    assert {plan.kind for plan in smoothed} == {"conv2d", "linear"}
    for plan in smoothed:
        factors = result.state[f"{plan.site}.smoothing"].reciprocal()
        assert 1 - 1e-6 <= float(factors.min()) <= float(factors.max()) <= 10 + 1e-4
    seen = [record.text for record in result.history]
    assert sum("rounds=3, samples_from='student'" in text for text in seen) == 2


def test_tcaq_dm_resumes_within_a_round(program: Program, quantised: dict[str, Program], tmp_path: Path) -> None:
    """Killed in a later round of the second reconstruction: the result is the same to the bit."""

    class Interrupted(Exception):
        pass

    def stop(update: Update) -> None:
        seen[0] += update.step <= seen[1]
        seen[1] = update.step
        if seen[0] == 1 and update.step > 0.8 * update.total:
            raise Interrupted

    seen, recipe, wanted = [0, 0], _short("tcaq-dm"), quantised["tcaq-dm"]
    with pytest.raises(Interrupted):
        api.quantise(program, recipe, "w4a4", work_dir=tmp_path / "run", on_update=stop)
    found = api.quantise(program, recipe, "w4a4", work_dir=tmp_path / "run", resume=True)
    assert all(torch.equal(tensor, wanted.state[key]) for key, tensor in found.state.items())


def test_q_diffusion_resumes_in_either_reconstruction(
    program: Program, quantised: dict[str, Program], tmp_path: Path
) -> None:
    """Killed between units of the first, then of the second: the result is the same to the bit."""

    class Interrupted(Exception):
        pass

    def stop_in(second: bool):
        seen = [0, 0]  # reconstructions begun, last step

        def stop(update: Update) -> None:
            seen[0] += update.step <= seen[1] or not seen[0]
            seen[1] = update.step
            if seen[0] == 1 + second and update.epoch == 5:
                raise Interrupted

        return stop

    recipe, wanted = _short("q-diffusion"), quantised["q-diffusion"]
    with pytest.raises(Interrupted):
        api.quantise(program, recipe, "w4a4", work_dir=tmp_path / "run", on_update=stop_in(second=False))
    with pytest.raises(Interrupted):
        api.quantise(program, recipe, "w4a4", work_dir=tmp_path / "run", resume=True, on_update=stop_in(second=True))
    found = api.quantise(program, recipe, "w4a4", work_dir=tmp_path / "run", resume=True)
    assert all(torch.equal(tensor, wanted.state[key]) for key, tensor in found.state.items())


def test_a_checkpoint_of_another_step_is_not_taken(program: Program, tmp_path: Path) -> None:
    """One that is older than the program that was kept after its step."""
    from hqc.checkpoint import save_checkpoint

    recipe = _short("rtn")
    api.quantise(program, recipe, "w4a4", work_dir=tmp_path / "run")
    save_checkpoint(Checkpoint(3, {"value/x": torch.ones(1)}, of=1), tmp_path / "run" / "checkpoint")
    again = api.quantise(program, recipe, "w4a4", work_dir=tmp_path / "run", resume=True)
    assert again.stage == Stage.QUANTISED
