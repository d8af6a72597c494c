"""The Python API: program in, program out; the forward loop of the user; work folders that can be resumed."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
import zoo
from torch import nn

import hqc
from hqc import api
from hqc.calibration import activations
from hqc.errors import ArtefactError, PlanError, TrainingError
from hqc.program import Program, Stage
from hqc.recipes import Recipe, find_recipe
from hqc.recipes.run import Request, run_settings
from hqc.sampling import Update

SETTINGS = {"distil.updates": 5, "distil.batch_size": 2, "distil.checkpoint_every": 2}


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_pipeline.saved_pipeline("classes")


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny_pipeline.traced_pipeline("classes")


def small(name: str) -> Recipe:
    """The recipe, calibrated on two images of four steps."""
    short = {"calibrate_activations.samples": 2, "calibrate_activations.candidates": 10}
    found = api.recipe_of(name, {**short, "sampler.num_inference_steps": 4})
    return found.set("attach_lora.rank", 2).with_rate("lora_a", 0.5) if found.kind == "qat" else found


def forward_loop(unet: nn.Module) -> None:
    """What a user of quantisation tools writes: the pipeline with its UNet replaced."""
    pipeline = tiny_pipeline.tiny_pipeline()
    pipeline.unet = unet
    pipeline([1, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent")


# ---- names ---------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    assert all(getattr(hqc, name) is not None for name in hqc.__all__)
    assert hqc.qat is api.qat
    with pytest.raises(AttributeError, match="module 'hqc' has no attribute 'quantize'"):
        hqc.quantize  # noqa: B018


@pytest.mark.parametrize("command", ["import hqc", "from hqc.cli import main; main(['--help'], standalone_mode=False)"])
def test_nothing_heavy_is_imported_for_help(command: str) -> None:
    code = f"{command}\nimport sys\nheavy = sys.modules.keys() & {{'torch', 'numpy', 'diffusers', 'onnx', 'rich'}}\n"
    done = subprocess.run([sys.executable, "-c", code + "assert not heavy, heavy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- ptq -----------------------------------------------------------------------------------------------------------


def test_ptq_quantises_on_the_pipeline_that_was_traced(program: Program) -> None:
    before = zoo.fingerprint(program)
    result = hqc.ptq(program, small("rtn"), "W4A4")
    assert zoo.fingerprint(program) == before
    assert (result.stage, result.plan.recipe, result.plan.bits) == (Stage.QUANTISED, "rtn", "w4a4")
    assert result.plan.timesteps == (0.0, 25.0, 50.0, 75.0)
    assert not any(plan.block for plan in result.plan.sites)
    tables = [t for name, t in result.state.items() if name.endswith("activation_scale_table")]
    assert len(tables) == len(result.plan.quantised) > 10
    assert all(len(table) == 4 for table in tables)
    assert sum(bool((table != 1).all()) for table in tables) == len(tables)


def test_hadamard_inserts_rotations(program: Program) -> None:
    plain = hqc.ptq(program, small("rtn"), "w4a4")
    rotated = hqc.ptq(program, small("rtn"), "w4a4", hadamard=True, block=16)
    assert {plan.block for plan in rotated.plan.sites} == {0, 16}
    calls = [str(node.target) for node in rotated.graph.nodes]
    assert "hqc.hadamard.default" in calls
    assert "hqc.hadamard.default" not in [str(node.target) for node in plain.graph.nodes]


def test_ptq_with_a_forward_loop(program: Program) -> None:
    """The grid is what the loop visits, and the scales are those of the loop's own images."""
    result = hqc.ptq(program, small("rtn"), "w4a4", forward_loop=forward_loop)
    assert result.plan.timesteps == (0.0, 33.0, 66.0)
    built_in = hqc.ptq(program, small("rtn"), "w4a4")
    assert len(result.plan.quantised) == len(built_in.plan.quantised)
    sample, timestep, condition = program.example_inputs(2)
    wanted = program.module()(sample, timestep * 0 + 33, condition)
    error = (result.module()(sample, timestep * 0 + 33, condition) - wanted).norm() / wanted.norm()
    assert 1e-3 < float(error) < 0.5


def test_keep_float(program: Program) -> None:
    result = hqc.ptq(program, small("rtn"), "w4a4", keep_float=("*.to_q", "conv_in"))
    kept = [plan.site for plan in result.plan.sites if not plan.quantised]
    assert "conv_in" in kept
    assert all(site.endswith(".to_q") or site == "conv_in" for site in kept)
    assert len(kept) >= 3


def test_a_forward_loop_that_never_calls_is_refused(program: Program) -> None:
    with pytest.raises(TrainingError, match="the forward loop never called the model"):
        hqc.ptq(program, small("rtn"), "w4a4", forward_loop=lambda unet: None)


def test_a_module_without_pipeline_says_what_to_give(captured: Callable[[str], Program]) -> None:
    with pytest.raises(TrainingError) as caught:
        hqc.ptq(captured("in_place"), "rtn", "w4a4")
    assert str(caught.value) == (
        "program from in_place: was not traced from a pipeline, so hqc cannot sample it. "
        "Give --synthetic for noise and random conditions, or task=Task(...) or forward_loop=… from Python."
    )


def test_a_module_without_pipeline_takes_a_forward_loop(captured: Callable[[str], Program]) -> None:
    def loop(model: nn.Module) -> None:
        for time in (10, 20.0, torch.tensor(30)):
            output = model(torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0)), time)
            assert output.sample.shape == (2, 32, 4, 4)

    result = hqc.ptq(captured("in_place"), "rtn", "w8a8", forward_loop=loop)
    assert result.plan.timesteps == (10.0, 20.0, 30.0)


def test_recipes_are_sent_to_the_right_function(program: Program) -> None:
    with pytest.raises(PlanError, match="recipe 'hq-dm': needs training"):
        hqc.ptq(program, "hq-dm")
    with pytest.raises(PlanError, match="recipe 'rtn': does not train"):
        hqc.qat(program, "rtn")


# ---- qat -----------------------------------------------------------------------------------------------------------


def _qat(program: Program, **options: Any) -> Program:
    return hqc.qat(program, small("hq-dm"), "w4a4", settings=options.pop("settings", SETTINGS), **options)


@pytest.fixture(scope="module")
def uninterrupted(program: Program) -> Program:
    return _qat(program)


def _same_bits(ours: Program, theirs: Program) -> bool:
    return ours.state.keys() == theirs.state.keys() and all(
        torch.equal(tensor, theirs.state[name]) for name, tensor in ours.state.items()
    )


def test_qat_trains_and_tells(program: Program, uninterrupted: Program) -> None:
    steps = list[Update]()
    result = _qat(program, on_update=steps.append)
    assert (result.stage, result.plan.recipe) == (Stage.TRAINED, "hq-dm")
    assert [(s.step, s.total) for s in steps] == [(k, 5) for k in range(1, 6)]
    assert _same_bits(result, uninterrupted)
    assert result.plan.training["steps"]["distil.updates"] == 5
    assert len(result.plan.training["weights_sha256"]) == 64


def test_qat_with_a_forward_loop(program: Program) -> None:
    result = _qat(program, forward_loop=forward_loop)
    assert result.plan.timesteps == (0.0, 33.0, 66.0)
    assert result.stage == Stage.TRAINED


class _Interrupted(Exception):
    pass


def _stop_after(step: int) -> Callable[[Update], None]:
    def on_step(record: Update) -> None:
        if record.step == step:
            raise _Interrupted

    return on_step


def _log(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("after", [1, 2, 3, 4], ids=["before a checkpoint", "at one", "between", "at the second"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    program: Program, uninterrupted: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    with pytest.raises(_Interrupted):
        _qat(program, work_dir=tmp_path, on_update=_stop_after(after))
    assert _log(tmp_path) == list(range(1, after + 1))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(activations, "calibrate", refuse)
    went_on: list[int] = []
    result = _qat(program, work_dir=tmp_path, resume=True, on_update=lambda update: went_on.append(update.step))
    assert _same_bits(result, uninterrupted)
    assert _log(tmp_path) == [1, 2, 3, 4, 5]
    # A checkpoint is written after the step is told, so the one of this step is not there yet.
    assert went_on[0] == (after - 1) // 2 * 2 + 1


def test_finish_run_leaves_the_log(program: Program, tmp_path: Path) -> None:
    _qat(program, work_dir=tmp_path)
    (tmp_path / ".checkpoint.hqc-1234abcd").mkdir()  # what a kill in the middle of writing leaves
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json",
        "08-distil.hqc",
        "log.jsonl",
        ".checkpoint.hqc-1234abcd",
    }
    api.finish_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_new_run_forgets_the_old_one_if_it_is_told_to(
    program: Program, uninterrupted: Program, tmp_path: Path
) -> None:
    other = {**SETTINGS, "distil.seed": 1}
    with pytest.raises(_Interrupted):
        _qat(program, work_dir=tmp_path, settings=other, on_update=_stop_after(4))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ArtefactError) as caught:
        _qat(program, work_dir=tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: holds an unfinished run (a checkpoint after update 2). "
        "Give --resume to continue it, or --restart to drop it and begin anew."
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(_Interrupted):  # before its own first checkpoint
        _qat(program, work_dir=tmp_path, restart=True, on_update=_stop_after(1))
    assert _same_bits(_qat(program, work_dir=tmp_path, resume=True), uninterrupted)
    assert _log(tmp_path) == [1, 2, 3, 4, 5]


def test_two_runs_never_share_a_work_folder(program: Program, tmp_path: Path) -> None:
    """The second is refused when it starts, whoever it is."""
    refused: list[str] = []

    def second() -> None:
        try:
            _qat(program, work_dir=tmp_path / "run", restart=True)
        except ArtefactError as error:
            refused.append(error.found)

    def on_step(record: Update) -> None:
        if record.step == 1:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    _qat(program, work_dir=tmp_path / "run", on_update=on_step)
    assert refused == [f"is being written by another hqc command (process {os.getpid()})"]
    assert _log(tmp_path / "run") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "name", ["checkpoint", "quantised.hqc", "06-calibrate_activations.hqc", "run.json", "log.jsonl"]
)
def test_what_is_not_hqcs_in_a_work_folder_is_left_alone(program: Program, tmp_path: Path, name: str) -> None:
    mine = tmp_path / name if "json" in name else tmp_path / name / "weights.pt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text('{"epoch": 1}\n')
    for restart in (False, True):
        with pytest.raises(ArtefactError, match=r"exists and was not written by hqc\. Choose another --work-dir"):
            _qat(program, work_dir=tmp_path, restart=restart)
    api.finish_run(tmp_path)
    assert mine.read_text() == '{"epoch": 1}\n'


def test_resuming_and_restarting_exclude_each_other(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="exclude each other"):
        _qat(program, work_dir=tmp_path, resume=True, restart=True)


# ---- resuming what is not there, or is another run -----------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(_Interrupted):
        _qat(program, work_dir=folder, on_update=_stop_after(3))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {**SETTINGS, "distil.seed": 1}}, "steps.distil.seed was 3407, now 1"),
        ({"settings": {**SETTINGS, "sampler.eta": 0.5}}, "sampler.eta was 0.0, now 0.5"),
        ({"keep_float": ("conv_in",)}, "keep_float was [], now ['conv_in']"),
    ],
    ids=["seed", "eta", "keep_float"],
)
def test_resuming_with_other_settings_is_refused(
    program: Program, interrupted: Path, change: dict[str, Any], said: str
) -> None:
    before = _log(interrupted)
    with pytest.raises(ArtefactError, match="belongs to a run with other settings") as caught:
        _qat(program, work_dir=interrupted, resume=True, **change)
    assert f"({said})" in str(caught.value)
    assert _log(interrupted) == before


def test_resuming_with_several_differences_lists_them_all(program: Program, interrupted: Path) -> None:
    settings = {**SETTINGS, "distil.seed": 1, "distil.batch_size": 3}
    with pytest.raises(ArtefactError) as caught:
        hqc.qat(program, small("hq-dm"), "w4a3", settings=settings, work_dir=interrupted, resume=True)
    for part in ("bits was 'w4a4', now 'w4a3'", "distil.batch_size was 2, now 3", "distil.seed was 3407, now 1"):
        assert part in str(caught.value)


def test_resuming_with_other_weights_is_refused(program: Program, interrupted: Path) -> None:
    name = next(iter(program.state))
    other = program.evolve(state={**program.state, name: program.state[name] + 1e-6})
    with pytest.raises(ArtefactError, match="weights_sha256 was"):
        _qat(other, work_dir=interrupted, resume=True)


def test_checkpointing_more_often_is_no_other_run(program: Program, interrupted: Path, uninterrupted: Program) -> None:
    often = {**SETTINGS, "distil.checkpoint_every": 1}
    assert _same_bits(_qat(program, work_dir=interrupted, resume=True, settings=often), uninterrupted)


def test_a_run_of_an_older_version_is_refused_and_can_be_dropped(
    program: Program, uninterrupted: Program, tmp_path: Path
) -> None:
    """It kept one program, quantised.hqc, whose plan had the settings."""
    hqc.save_program(hqc.ptq(program, small("rtn"), "w4a4"), tmp_path / "run" / "quantised.hqc")
    with pytest.raises(ArtefactError) as caught:
        _qat(program, work_dir=tmp_path / "run", resume=True)
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: belongs to a run of another version. Give --restart to begin anew."
    )
    with pytest.raises(ArtefactError, match="holds an unfinished run"):
        _qat(program, work_dir=tmp_path / "run")
    assert _same_bits(_qat(program, work_dir=tmp_path / "run", restart=True), uninterrupted)
    assert not (tmp_path / "run" / "quantised.hqc").exists()


def test_resuming_nothing_is_refused(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError) as caught:
        _qat(program, work_dir=tmp_path / "none", resume=True)
    assert str(caught.value) == f"{tmp_path / 'none'}: holds no run to resume. Start it without --resume."
    assert not (tmp_path / "none").exists()


def test_resuming_without_a_work_folder_is_refused(program: Program) -> None:
    with pytest.raises(ArtefactError, match="resume: no work folder was given"):
        _qat(program, resume=True)


def test_a_damaged_checkpoint_is_refused(program: Program, tmp_path: Path) -> None:
    with pytest.raises(_Interrupted):
        _qat(program, work_dir=tmp_path, on_update=_stop_after(3))
    path = tmp_path / "checkpoint" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ArtefactError, match="is damaged"):
        _qat(program, work_dir=tmp_path, resume=True)


def test_a_fingerprint_takes_weights_without_axes(captured: Callable[[str], Program]) -> None:
    # A scalar cannot be viewed as bytes as it is: this raised before.
    program = captured("two_sites")

    def digest(value: float) -> object:
        changed = program.evolve(state={**program.state, "scalar": torch.tensor(value)})
        return run_settings(changed, find_recipe("hq-dm"), Request("w4a4"), "noise")["weights_sha256"]

    assert digest(1.0) == digest(1.0)
    assert digest(1.0) != digest(2.0)
