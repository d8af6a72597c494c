"""QuEST end to end on a tiny pipeline: who learns, how much of the model it is, its exports, and a killed run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_pipeline import traced_pipeline
from torch import nn

import hqc
from hqc import api
from hqc.calibration import Smooth
from hqc.capture import trace
from hqc.capture.sources import Source
from hqc.errors import PlanError
from hqc.program import InputSpec, Origin, Program, Stage
from hqc.recipes import RECIPES, Recipe, find_recipe
from hqc.recipes.run import Request, planned
from hqc.sampling import Update
from hqc.sampling.sources import synthetic_task

SHORT = {
    "sampler.num_inference_steps": 4,
    "smooth.samples": 1,
    "smooth.rows": 8,
    "smooth.candidates": 5,
    "insert_qdq.groups": 2,
    "reconstruct.samples": 1,
    "reconstruct.timesteps": 2,
    "reconstruct.iterations": 5,
    "reconstruct.batch_size": 2,
    "calibrate_activations.samples": 2,
    "calibrate_activations.candidates": 10,
    "distil.updates": 6,
    "distil.batch_size": 2,
    "distil.checkpoint_every": 2,
    "finetune_only.share": 0.3,
}
TIME, ATTENTION = ("time_emb",), (".to_q", "attn1.to_k", "attn1.to_v", ".ff.net.")


def short(**more: object) -> Recipe:
    """The share is larger than the recipe's: of a model this small the time embedding alone is more."""
    return api.recipe_of("quest", {**SHORT, **more})


@pytest.fixture(scope="module")
def program() -> Program:
    return traced_pipeline("classes")


@pytest.fixture(scope="module")
def stages(program: Program) -> tuple[Program, Program, Program]:
    """Before the first stage, after it, and after the second one."""
    recipe = short()
    steps = recipe.steps
    found = [Recipe("quest", "", steps[:count], recipe.sampler) for count in (-2, -1)]
    return (*(api.quantise(program, one, "w4a4") for one in found), api.quantise(program, recipe, "w4a4"))  # type: ignore[return-value]


def changed(before: Program, after: Program) -> set[str]:
    assert before.state.keys() == after.state.keys()
    return {name for name, value in after.state.items() if not torch.equal(value, before.state[name])}


def learning(program: Program, kinds: tuple[str, ...]) -> set[str]:
    """Weights and scale tables of the layers that may learn and are of these kinds."""
    sites = [plan for plan in program.plan.quantised if plan.trained and any(kind in plan.site for kind in kinds)]
    leaves = {plan.site: "weight_smoothed" if plan.smoothed else "weight" for plan in sites}
    return {f"{s}.{leaf}" for s, weight in leaves.items() for leaf in (weight, "activation_scale_table")}


def test_each_stage_trains_its_own_layers_and_nothing_else(stages: tuple[Program, Program, Program]) -> None:
    before, first, second = stages
    assert (before.stage, first.stage, second.stage) == (Stage.QUANTISED, Stage.TRAINED, Stage.TRAINED)
    for start, end, kinds in ((before, first, TIME), (first, second, ATTENTION)):
        wanted = learning(second, kinds)
        assert len(wanted) >= 4
        assert changed(start, end) == wanted
    assert {name.rpartition(".")[2] for name in changed(before, second)} == {
        "weight",
        "weight_smoothed",
        "activation_scale_table",
    }


def test_at_most_the_share_of_the_parameters_learns(program: Program, stages: tuple[Program, Program, Program]) -> None:
    before, _, second = stages
    total = sum(tensor.numel() for tensor in second.state.values() if tensor.is_floating_point())
    learnt = sum(second.state[name].numel() for name in changed(before, second))
    assert 0.1 < learnt / total <= 0.3
    assert any("at most 30 % may" in plan.reason for plan in second.plan.sites)
    with pytest.raises(PlanError, match=r"is \d[\d.]* % of the parameters; at most 0.01 % may learn"):
        planned(program, short(**{"finetune_only.share": 1e-4}), Request("w4a4"), calibrated=False)


def test_the_recipe_keeps_to_seven_percent_of_a_usual_model(captured: Callable[[str], Program]) -> None:
    digits = captured("digits")
    plan = planned(digits, RECIPES["quest"], Request("w4a4"), calibrated=False)
    tensors = [plan.state[name] for name in learning(plan, (*TIME, *ATTENTION))]
    total = sum(tensor.numel() for tensor in digits.state.values() if tensor.is_floating_point())
    assert 0.06 < sum(t.numel() for t in tensors) / total <= 0.07
    sites = [p.site for p in plan.plan.quantised if p.trained]
    assert all(any(kind in site for site in sites) for kind in ("time_emb_proj", "to_q", "attn1.to_k", "ff.net.2"))


def test_scales_have_a_row_a_group(program: Program, stages: tuple[Program, Program, Program]) -> None:
    result = stages[2]
    times = result.plan.timesteps
    assert len(times) == 4
    assert result.state["timestep_grid"].tolist() == [(times[0] + times[1]) / 2, (times[2] + times[3]) / 2]
    assert {len(t) for name, t in result.state.items() if name.endswith("_table")} == {2}
    assert all(plan.smoothed == (plan.weight_bits == 4) for plan in result.plan.quantised)
    wide = planned(program, short(), Request("w4a8"), calibrated=False)
    assert not any(plan.smoothed for plan in wide.plan.sites)


@pytest.mark.parametrize("target", ["portable", "onnxruntime", "tensorrt"])
def test_its_exports_equal_it(stages: tuple[Program, Program, Program], target: str, tmp_path: Path) -> None:
    """Every site is verified with timesteps of both groups in one batch."""
    result = stages[2]
    report = hqc.export_program(result, target, tmp_path / "x")
    assert len(report.verification.sites) == len(result.plan.quantised)


@pytest.mark.parametrize("stage", [1, 2])
def test_it_resumes_in_either_stage_to_the_same_bits(
    program: Program, stages: tuple[Program, Program, Program], stage: int, tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    heard: list[Update] = []

    def stop(update: Update) -> None:
        heard.append(update)
        begun = sum(one.total == 6 and one.step == 1 for one in heard)
        if begun == stage and update.total == 6 and update.step == 5:
            raise Interrupted

    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        api.quantise(program, short(), "w4a4", work_dir=folder, on_update=stop)
    kept = {1: "10-calibrate_activations.hqc", 2: "11-distil.hqc"}[stage]
    assert [path.name for path in folder.glob("*.hqc")] == [kept]
    assert (folder / "checkpoint").exists()
    again: list[Update] = []
    found = api.quantise(program, short(), "w4a4", work_dir=folder, resume=True, on_update=again.append)
    assert [one.step for one in again][:2] == [5, 6]
    assert changed(found, stages[2]) == set()
    assert found.plan.sites == stages[2].plan.sites


class _Plain(nn.Module):
    """A denoiser of convolutions, with a time embedding if that is asked for, and no attention."""

    def __init__(self, *, embedded: bool) -> None:
        super().__init__()
        self.conv_in, self.middle, self.conv_out = (
            nn.Conv2d(a, b, 3, padding=1) for a, b in ((4, 32), (32, 32), (32, 4))
        )
        self.time_emb_proj = nn.Linear(8, 32) if embedded else None

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(sample)
        if self.time_emb_proj is not None:
            waves = torch.sin(timestep.view(-1, 1) * torch.arange(1, 9) / 300)
            hidden = hidden + self.time_emb_proj(waves)[:, :, None, None]
        else:
            hidden = hidden + (timestep / 1000).view(-1, 1, 1, 1)
        return self.conv_out(torch.tanh(self.middle(hidden)))


@pytest.fixture(scope="module")
def plain() -> Callable[[bool], Program]:
    def build(embedded: bool) -> Program:
        torch.manual_seed(4)
        inputs = (InputSpec("sample", ("N", 4, 4, 4)), InputSpec("timestep", ("N",)))
        return trace(Source(_Plain(embedded=embedded), inputs, Origin(source="plain")))

    return build


def test_a_model_without_attention_has_its_first_stage_and_says_so(plain: Callable[[bool], Program]) -> None:
    program = plain(True)
    result = api.quantise(program, short(), "w4a8", task=synthetic_task(program))
    first, second = result.history[-2:]
    assert (first.touched, second.touched) == (("time_emb_proj",), ())
    record = next(one for one in result.history if one.text.startswith("finetune_only"))
    assert dict(record.missed)["*.to_q"] == dict(record.missed)["*.ff.net.*"] == "names no layer that may learn"


def test_a_model_without_either_is_refused_before_anything_runs(plain: Callable[[bool], Program]) -> None:
    with pytest.raises(PlanError, match="names no quantised layer that may learn") as caught:
        planned(plain(False), find_recipe("quest"), Request("w4a8"), calibrated=False)
    assert len(str(caught.value)) <= 300


def test_its_share_is_refused_before_long_work_and_leaves_no_folder(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`finetune_only` stands behind `smooth`, which samples: at w4a4 there are factors to choose."""
    ran: list[str] = []
    monkeypatch.setattr(Smooth, "run", lambda self, given, work: ran.append("smooth") or given)
    recipe, folder = short(**{"finetune_only.share": 1e-4}), tmp_path / "run"
    with pytest.raises(PlanError, match=r"finetune_only .* is \d[\d.]* % of the parameters; at most 0.01 % may learn"):
        api.quantise(program, recipe, "w4a4", work_dir=folder)
    assert ran == []
    assert list(tmp_path.iterdir()) == []
