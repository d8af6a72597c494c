"""Every command on a tiny pipeline, from trace to serve; and what each says, and leaves alone, when it cannot go on."""

import base64
import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import tiny_pipeline
import torch
from click.testing import CliRunner
from command_line import hqc
from command_line import silently_ok as ok
from PIL import Image
from safetensors import SafetensorError

from hqc.cli import main
from hqc.console import console
from hqc.storage import load_program, save_program

STEPS = ("--num-inference-steps", "4")


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below, hidden ones too, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def refused(folder: Path, *arguments: object) -> str:
    """The one line that a refused command says; nothing below `folder` changes, nothing is left behind."""
    before = tree(folder)
    result = hqc(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("hqc: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    assert "Traceback" not in result.output
    assert tree(folder) == before
    return result.stderr.removeprefix("hqc: ").rstrip("\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One artefact of every kind, each by its command, with what the command printed."""
    work = tmp_path_factory.mktemp("cli")
    source = tiny_pipeline.save_tiny_pipeline(work / "pipeline")
    program, rtn, rotated, trained = (work / f"{name}.hqc" for name in ("program", "rtn", "rotated", "trained"))
    integer, portable = work / "integer", work / "portable"
    said = {
        "trace": ok("trace", source, "-o", program, "--json"),
        "ptq": ok("ptq", program, "-o", rtn, *STEPS, "--calib-size", "2", "--bits", "W4A4"),
        "ptq --hadamard": ok("ptq", program, "-o", rotated, "--n-steps", "4", "--calib_size", "2", "--hadamard"),
        "qat": ok(
            *("qat", program, "-o", trained, "--steps", "4", "--batch-size", "2", *STEPS, "--calib-size", "2"),
            *("--checkpoint-every", "2", "--json"),
        ),
        "export": ok("export", trained, "-o", integer, "--json"),
        "export --target portable": ok("export", trained, "-o", portable, "--target", "portable"),
    }
    return SimpleNamespace(
        work=work,
        source=source,
        program=program,
        rtn=rtn,
        rotated=rotated,
        trained=trained,
        integer=integer,
        portable=portable,
        said=said,
    )


# ---- the way from a checkpoint to images ---------------------------------------------------------------------------


def test_trace(made: SimpleNamespace) -> None:
    said = json.loads(made.said["trace"].stdout)
    program = load_program(made.program)
    assert said["sites"] == len(list(program.sites())) > 10
    assert said["nodes"] == len(program.graph.nodes)
    assert said["weights_bytes"] == program.size_bytes()
    assert 0 <= said["graph_equals_module_relative_error"] < 1e-5
    assert (made.program / "pipeline" / "vae").is_dir()
    assert not (made.program / "pipeline" / "unet").exists()


def test_explain(made: SimpleNamespace) -> None:
    text = ok("explain", made.program, "--bits", "w4a3", "--keep-float", "*.to_q").stdout
    assert "hq-dm w4a3" in text
    assert "rules, last match wins:" in text
    assert "pipeline: drop_single_key_attention(), select_layers(), insert_hadamard()" in text
    assert "rule '*.to_q': asked for" in text
    assert "  removed down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q\n" in text
    assert re.search(r"^weights: [\d.]+ [kM]B by their bits, [\d.]+ [kM]B as int8 and packed int4$", text, re.MULTILINE)
    assert "3 input channels" in text or "4 input channels" in text or "first or last layer" in text


def test_explain_as_json(made: SimpleNamespace) -> None:
    said = json.loads(ok("explain", made.program, "--recipe", "rtn", "--json").stdout)
    sites = {site["site"]: site for site in said["plan"]["sites"]}
    assert sites["conv_in"]["weight_bits"] == 8
    assert 0 < said["weights"]["bytes_by_bits"] == said["weights"]["bytes_stored"]  # four and eight bits, symmetric
    assert "insert_hadamard" not in said["pipeline"]
    assert [ran["pass"].partition("(")[0] for ran in said["passes"]] == [
        "drop_single_key_attention",
        "select_layers",
        "insert_qdq",
    ]
    assert said["passes"][0]["removed"]  # the context is one token
    assert all(site.endswith(("attn2.to_q", "attn2.to_k")) for site in said["passes"][0]["removed"])
    assert not sites.keys() & set(said["passes"][0]["removed"])
    plain = json.loads(ok("explain", made.program, "--no-hadamard", "--json").stdout)
    assert "attach_lora" in plain["pipeline"]
    assert "insert_hadamard" not in plain["pipeline"]
    rotated = json.loads(ok("explain", made.program, "--block", "16", "--rules", "all", "--json").stdout)
    assert {site["block"] for site in rotated["plan"]["sites"]} == {0, 16}


def test_explain_a_target(made: SimpleNamespace) -> None:
    said = json.loads(ok("explain", made.program, "--target", "onnxruntime", "--json").stdout)
    assert said["does_not_take"] == []
    assert said["takes"]["aten.conv2d.default"] > 5
    assert "aten.conv2d.default" in ok("explain", made.program, "--target", "portable").stdout


@pytest.mark.parametrize("runtime", ["torch-int8", "torch-cuda"])
def test_explain_a_runtime(made: SimpleNamespace, runtime: str, tmp_path: Path) -> None:
    said = json.loads(ok("explain", made.rtn, "--target", runtime, "--json").stdout)
    assert (said["target"], said["does_not_take"]) == (runtime, [])
    assert said["takes"]["hqc.int_linear.default"] > 5
    assert f"target {runtime} takes of" in ok("explain", made.rtn, "--target", runtime).stdout
    whole = hqc("explain", made.program, "--target", runtime)
    assert whole.exit_code == 1
    assert f"does not take runtime {runtime}: runs integer products and the program is not quantised." in whole.stdout
    tables = tmp_path / "tables.hqc"
    ok("ptq", made.program, "-o", tables, *STEPS, "--recipe", "ganq", "--set", "fit_lookup.samples=1")
    listed = json.loads(hqc("explain", tables, "--target", runtime, "--json").stdout)["does_not_take"]
    assert [(refused["operator"], refused["found"]) for refused in listed] == [
        ("site", "has a weight of a table of real numbers, which no integer product takes")
    ]
    assert len(listed[0]["nodes"]) > 5


def test_an_unknown_target_is_refused_by_its_name(made: SimpleNamespace) -> None:
    # click's mark of an option without a value of its own is truthy, and once took the place of what was typed.
    result = CliRunner().invoke(main, ["explain", str(made.program), "--target", "openvino"])
    assert result.exit_code == 2
    assert "'openvino' is not one of" in result.output


def test_what_no_target_takes_is_said_before_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pooled.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)\n\n    def forward(self, sample, timestep):\n"
        "        pooled = torch.nn.functional.max_pool2d(self.conv(sample), 3, 1, 1)\n"
        "        return pooled + timestep[:, None, None, None]\n\n\n"
        "def build():\n    return Net(), {'sample': torch.zeros(2, 8, 4, 4), 'timestep': torch.zeros(2)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    captured, quantised = tmp_path / "pooled.hqc", tmp_path / "quantised.hqc"
    warning = "hqc: warning: no export target takes this program: aten.max_pool2d.default (max_pool2d): has no ONNX "
    traced = hqc("trace", "pooled:build", "-o", captured, "--json")
    assert (traced.exit_code, json.loads(traced.stdout)["exports_to"]) == (0, [])
    made = hqc("ptq", captured, "-o", quantised, "--synthetic", "--calib-size", "1", "--n-steps", "1")
    assert made.exit_code == 0
    for said in (traced.stderr, made.stderr):
        assert said.startswith(warning)
        assert said.endswith(f" `hqc explain --target portable {captured}` lists everything.\n")
        assert said.count("\n") == 1
    for program in (captured, quantised):
        listed = hqc("explain", program, "--target", "tensorrt")
        assert listed.exit_code == 1
        assert "does not take aten.max_pool2d.default (max_pool2d): has no ONNX translation." in listed.stdout
        assert listed.stderr == ""


def test_explain_writes_nothing(made: SimpleNamespace) -> None:
    before = tree(made.work)
    ok("explain", made.program)
    ok("inspect", made.program)
    assert tree(made.work) == before


def test_inspect(made: SimpleNamespace) -> None:
    text = ok("inspect", made.rotated).stdout
    assert "= hqc.hadamard.default(" in text
    assert "insert_qdq()" in text
    assert "stage" in text
    assert "= hqc.hadamard.default(" not in ok("inspect", made.rotated, "--no-graph").stdout
    said = json.loads(ok("inspect", made.trained, "--json").stdout)
    assert said["stage"] == "trained"
    assert said["bytes_by_kind"]["lora_a"] > 0
    assert any("aten.conv2d.default" in line for line in said["graph"])


def test_ptq(made: SimpleNamespace) -> None:
    plain, rotated = load_program(made.rtn), load_program(made.rotated)
    assert (plain.plan.recipe, plain.plan.bits) == ("rtn", "w4a4")
    assert plain.plan.timesteps == rotated.plan.timesteps == (0.0, 25.0, 50.0, 75.0)
    assert {plan.block for plan in plain.plan.sites} == {0}
    assert {plan.block for plan in rotated.plan.sites} == {0, 32}


def test_calib_size_is_read_with_a_dash_and_with_an_underscore(made: SimpleNamespace, tmp_path: Path) -> None:
    """Both spellings of one number give one result, and another number another result."""
    names = ("--calib-size", "2"), ("--calib_size", "2"), ("--calib_size", "3")
    tables = []
    for i, option in enumerate(names):
        ok("ptq", made.program, "-o", tmp_path / f"{i}.hqc", *STEPS, *option)
        tables.append(load_program(tmp_path / f"{i}.hqc").state["conv_out.activation_scale_table"])
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_qat(made: SimpleNamespace) -> None:
    said = json.loads(made.said["qat"].stdout)
    trained = load_program(made.trained)
    assert (said["updates"], said["bits"], said["sites"]) == (4, "w4a4", len(trained.plan.quantised))
    assert said["last_loss"] > 0
    log = [json.loads(line) for line in Path(said["log"]).read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert log[-1]["loss"] == said["last_loss"]
    # What is only needed to resume is gone, the log is not.
    assert [path.name for path in Path(said["log"]).parent.iterdir()] == ["log.jsonl"]


def test_export(made: SimpleNamespace) -> None:
    said = json.loads(made.said["export"].stdout)
    assert (said["target"], said["opset"]) == ("onnxruntime", 21)
    assert said["size_bytes"] == sum(f.stat().st_size for f in made.integer.glob("model.onnx*"))
    assert said["verification"]["sites"] > 10
    text = made.said["export --target portable"].stdout
    assert text.startswith(f"exported {made.portable}: portable, opset 21, ")


def test_sample(made: SimpleNamespace, tmp_path: Path) -> None:
    output = tmp_path / "grid.png"
    ok("sample", made.integer, "-o", output, *STEPS, "--labels", "1,4", "--per-class", "2")
    with Image.open(output) as grid:
        assert grid.format == "PNG"
        single = grid.size
    both = tmp_path / "both.png"
    models = ("--compare-with", made.program, "--compare-with", made.portable)
    ok("sample", made.integer, "-o", both, *STEPS, "--labels", "1,4", "--per-class", "2", *models)
    with Image.open(both) as grid:
        assert grid.size[0] > 1.5 * single[0]  # three blocks of images beside one column of labels


def test_sample_is_deterministic(made: SimpleNamespace, tmp_path: Path) -> None:
    common = ("sample", made.trained, *STEPS, "--labels", "0-2", "--per-class", "1", "-o")
    ok(*common, tmp_path / "a.png")
    ok(*common, tmp_path / "b.png")
    ok(*common, tmp_path / "c.png", "--seed", "5")
    images = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert images[0] == images[1] != images[2]


def test_comparing_a_model_with_itself(made: SimpleNamespace, tmp_path: Path) -> None:
    options = (*STEPS, "--labels", "1", "--per-class", "1", "-o", tmp_path / "x.png")
    assert "is compared with itself" in refused(
        tmp_path, "sample", made.trained, "--compare-with", made.trained, *options
    )


def test_eval(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    common = (*STEPS, "--images", "70", "--batch-size", "70")
    said = json.loads(ok("eval", made.integer, "--against", made.program, *common, "--json").stdout)
    assert said["model"] == str(made.integer)
    assert said["num_images"] == 70
    assert 5 < said["psnr_db"] < 80
    assert 0 < said["latent_cosine"] < 1
    assert said["protocol"]["num_inference_steps"] == 4
    trajectory = said["trajectory"]
    assert (trajectory["num_images"], trajectory["seeds"]) == (64, "0..63")
    assert len(trajectory["timesteps"]) == len(trajectory["gain_by_timestep"]) == 4
    assert 0.5 < min(trajectory["gain_by_timestep"]) <= trajectory["gain"] <= max(trajectory["gain_by_timestep"]) < 1.5
    assert trajectory["latent_cosine_least"] <= trajectory["latent_cosine_mean"] < 1
    assert said["inception_score_gain_1"] != said["inception_score"]
    assert said["inception_score_deviation"] == pytest.approx(
        abs(said["inception_score"] / said["inception_score_reference"] - 1)
    )
    # Not by COLUMNS: where that is set already when the program starts, the console keeps it.
    monkeypatch.setattr(console, "width", 120)
    text = ok("eval", made.program, "--against", made.program, *common, "--gain-images", "2").stdout
    assert "PSNR (dB)" in text
    assert "\n program.hqc  " in text
    assert "∞" in text  # the same images
    assert text.count("1.0000 · 1.0000") == 4  # a row a timestep
    assert "2 images, seeds 0..1." in text


def test_eval_without_what_costs_time(made: SimpleNamespace) -> None:
    common = ("eval", made.integer, "--against", made.program, *STEPS, "--images", "70", "--batch-size", "70", "--json")
    without = json.loads(ok(*common, "--no-gain-1", "--gain-images", "2").stdout)
    assert without["trajectory"]["num_images"] == 2
    assert without["inception_score_gain_1"] is None
    assert without["inception_score_gain_1_deviation"] is None
    assert without["inception_score_deviation"] > 0
    assert json.loads(ok(*common, "--gain-images", "0").stdout)["trajectory"] is None


def test_eval_says_why_there_is_no_score_at_gain_one(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hqc.evaluation.gain.LEAST_DIVISOR", 10.0)
    common = ("--images", "70", "--batch-size", "70", "--gain-images", "1", "--json")
    done = hqc("eval", made.integer, "--against", made.program, *STEPS, *common)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["inception_score_gain_1"] is None
    assert done.stderr.startswith("left out: IS at gain 1: the gain is ")


def test_timesteps_outside_the_calibrated_range_are_noted_once(
    made: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Calibrated at 0…75; five steps reach 80."""
    with caplog.at_level(logging.WARNING):
        hqc("sample", made.trained, "-o", tmp_path / "x.png", "--n-steps", "5", "--labels", "1", "--per-class", "3")
    notes = [record.getMessage() for record in caplog.records if "calibrated" in record.getMessage()]
    assert notes == ["timestep 80 lies outside the calibrated range 0…75: the nearest scales are used (noted once)"]
    assert (tmp_path / "x.png").is_file()


@pytest.mark.parametrize(
    ("name", "options", "runtime"),
    [
        ("integer", ("--threads", "1"), "onnxruntime"),
        pytest.param("trained", ("--runtime", "torch"), "torch", marks=pytest.mark.long),
    ],
)
def test_serve(made: SimpleNamespace, name: str, options: tuple[str, ...], runtime: str) -> None:
    folder = getattr(made, name)
    command = [sys.executable, "-m", "hqc.cli", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving at http://127.0.0.1:"), process.stderr and process.stderr.read()
        with httpx.Client(base_url=line.split()[2], timeout=60, trust_env=False) as client:
            health = client.get("/health")
            assert health.status_code == 200
            assert (health.json()["model"], health.json()["runtime"]) == (folder.name, runtime)
            body = {"prompt": "a handwritten 7", "num_inference_steps": 4, "seed": 3}
            answer = client.post("/v1/images/generations", json=body)
            assert answer.status_code == 200, answer.text
            png = base64.b64decode(answer.json()["data"][0]["b64_json"])
            with Image.open(io.BytesIO(png)) as image:
                assert image.size == (32, 32)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        _, stderr = process.communicate()
    assert "Traceback" not in stderr


# ---- a run that is killed ------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_bits(made: SimpleNamespace, tmp_path: Path) -> None:
    """SIGKILL after the first checkpoint; the resumed run ends where one that nobody killed does."""
    common = ("qat", made.program, "--steps", "8", "--batch-size", "2", *STEPS, "--eta", "0.5", "--calib-size", "2")
    common = (*common, "--checkpoint-every", "2", "--lr-lora", "0.5")
    whole, killed = tmp_path / "whole.hqc", tmp_path / "killed.hqc"
    work = tmp_path / "killed.hqc.training"
    command = [sys.executable, "-m", "hqc.cli", *map(str, common), "-o", str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 120
    while not (work / "checkpoint" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    before = [json.loads(line)["step"] for line in (work / "log.jsonl").read_text().splitlines()]
    assert 2 <= len(before) < 8
    ok(*common, "-o", killed, "--resume")
    ok(*common, "-o", whole)
    ours, theirs = load_program(killed), load_program(whole)
    assert ours.state.keys() == theirs.state.keys()
    assert [name for name in ours.state if not torch.equal(ours.state[name], theirs.state[name])] == []
    log = [json.loads(line)["step"] for line in (work / "log.jsonl").read_text().splitlines()]
    assert log == list(range(1, 9))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "killed.hqc",
        "killed.hqc.training",
        "whole.hqc",
        "whole.hqc.training",
    ]
    assert [path.name for path in work.iterdir()] == ["log.jsonl"]


def test_resuming_with_other_options_lists_them(made: SimpleNamespace, tmp_path: Path) -> None:
    common = ("qat", made.program, "-o", tmp_path / "x.hqc", *STEPS, "--calib-size", "2", "--batch-size", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hqc.training.trajectories.walk", _raise(KeyboardInterrupt()))
        assert hqc(*common, "--steps", "2").exit_code == 1
    said = refused(tmp_path, *common, "--steps", "3", "--resume", "--seed", "1")
    assert (
        "steps.attach_lora.seed was 3407, now 1; steps.distil.seed was 3407, now 1; steps.distil.updates was 2, now 3"
        in said
    )


def test_resuming_nothing(made: SimpleNamespace, tmp_path: Path) -> None:
    said = refused(tmp_path, "qat", made.program, "-o", tmp_path / "x.hqc", "--resume")
    assert "holds no run to resume" in said


# ---- refusals: options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "bits"),
    [*(("explain", bits) for bits in ("w9a4", "w4", "4a4", "w4a1", "w4a4x", "")), ("ptq", "w4a1"), ("qat", "w4a4x")],
)
def test_unknown_bits(made: SimpleNamespace, tmp_path: Path, command: str, bits: str) -> None:
    output = () if command == "explain" else ("-o", tmp_path / "x.hqc")
    said = refused(tmp_path, command, made.program, *output, "--bits", bits)
    assert said == f"bits {bits!r}: expected wNaM with N and M in 2…8. Use for example w4a4, w4a3 or w8a8."


@pytest.mark.parametrize("command", ["ptq", "qat", "explain"])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            ("--recipe", "mine"),
            "recipe 'mine': unknown; there are hqc, hq-dm, hq-dm-reference, efficientdm, mpq-dm, mpq-dmv2,",
        ),
        (("--rules", "mine"), "rules 'mine': unknown; there are default, reference, mixed, all. Use one of them."),
        (("--keep-float", "down.*.nothing"), "pattern 'down.*.nothing': matches no site. Sites are named like"),
    ],
    ids=["recipe", "rules", "keep-float"],
)
def test_unknown_names(
    made: SimpleNamespace, tmp_path: Path, command: str, options: tuple[str, ...], wanted: str
) -> None:
    output = () if command == "explain" else ("-o", tmp_path / "x.hqc")
    assert wanted in refused(tmp_path, command, made.program, *output, *options)


def test_recipes_of_the_other_command(made: SimpleNamespace, tmp_path: Path) -> None:
    assert "Use hqc qat" in refused(tmp_path, "ptq", made.program, "-o", tmp_path / "x", "--recipe", "hq-dm")
    assert "Use hqc ptq" in refused(tmp_path, "qat", made.program, "-o", tmp_path / "x", "--recipe", "rtn")


@pytest.mark.parametrize("command", [("ptq",), ("qat", "--no-hadamard"), ("explain", "--recipe", "rtn")], ids=" ".join)
def test_an_order_without_a_rotation(made: SimpleNamespace, tmp_path: Path, command: tuple[str, ...]) -> None:
    output = () if command[0] == "explain" else ("-o", tmp_path / "x.hqc")
    assert "--block 16" in refused(tmp_path, command[0], made.program, *command[1:], *output, "--block", "16")


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_learning_rates_out_of_range(made: SimpleNamespace, tmp_path: Path, rate: str) -> None:
    said = refused(tmp_path, "qat", made.program, "-o", tmp_path / "x.hqc", "--lr-lora", rate)
    assert said.startswith("--lr-lora: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "--target", "openvino", "-o", "x"),
        ("export", "--opset", "20", "-o", "x"),
        ("ptq", "--calib-size", "0", "-o", "x"),
        ("ptq", "--block", "24", "-o", "x"),
        ("qat", "--steps", "0", "-o", "x"),
        ("ptq",),
        ("sample", "--labels", "a-b"),
        ("sample", "--labels", "9-0"),
        ("sample", "--labels", "0-99999999999"),
        ("sample", "--runtime", "tpu"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_usage_errors(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = hqc(arguments[0], made.program, *arguments[1:])
    assert result.exit_code == 2
    assert "\nError: " in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("labels", ["11", "-1,2", "3,12"])
def test_labels_that_the_model_does_not_have(made: SimpleNamespace, tmp_path: Path, labels: str) -> None:
    result = hqc("sample", made.program, "-o", tmp_path / "x.png", f"--labels={labels}", "--per-class", "1", *STEPS)
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []
    if labels != "-1,2":
        number = labels.split(",")[-1]
        assert result.stderr == f"hqc: class {number}: the model has the classes 0 to 9. Give one of them.\n"


def test_too_few_images(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hqc.evaluation.sampling.sample_images", None)  # before any is sampled
    said = refused(tmp_path, "eval", made.program, "--against", made.program, "--images", "12", *STEPS)
    assert said.startswith("--images 12: 12 images in 10 splits")
    assert said.endswith("Give 65 or more.")
    said = refused(tmp_path, "eval", made.program, "--against", made.program, "--images", "64", *STEPS)
    assert said.startswith("--images 64: 64 images for 64 features")
    assert said.endswith("so at least 65 images. Give 65 or more.")


def test_a_program_that_was_quantised_already(made: SimpleNamespace, tmp_path: Path) -> None:
    said = refused(tmp_path, "ptq", made.rtn, "-o", tmp_path / "x.hqc", *STEPS)
    assert "takes a program that is captured; this one is quantised" in said
    assert "conv_in" in ok("explain", made.rtn).stdout
    assert json.loads(ok("explain", made.rtn, "--json").stdout)["plan"]["recipe"] == "rtn"
    said = refused(tmp_path, "explain", made.rtn, "--recipe", "hq-dm")
    assert said.startswith("--recipe: ")
    assert "is quantised and has its own plan" in said


def test_runtimes_that_do_not_fit(made: SimpleNamespace, tmp_path: Path) -> None:
    said = refused(tmp_path, "sample", made.program, "--runtime", "onnxruntime", "-o", tmp_path / "x.png")
    assert "runtime onnxruntime: cannot run" in said


# ---- refusals: what is on disk -------------------------------------------------------------------------------------


def _flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def _truncate(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def _version(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))


DAMAGE: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "bit flip": (_flip, "is damaged"),
    "truncated": (_truncate, "is truncated or changed"),
    "version": (_version, "has format version 99"),
    "file gone": (lambda folder, name: (folder / name).unlink(), "is missing"),
    "folder gone": (lambda folder, name: shutil.rmtree(folder), "no such folder"),
    "manifest gone": (lambda folder, name: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "manifest cut": (lambda folder, name: _truncate(folder, "manifest.json"), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["explain", "inspect", "ptq", "qat", "export", "sample"])
def test_a_damaged_program(made: SimpleNamespace, tmp_path: Path, command: str, damage: str) -> None:
    shutil.copytree(made.program, tmp_path / "copy.hqc")
    apply, wanted = DAMAGE[damage]
    apply(tmp_path / "copy.hqc", "weights.safetensors")
    output = () if command in ("explain", "inspect") else ("-o", tmp_path / "x")
    assert wanted in refused(tmp_path, command, tmp_path / "copy.hqc", *output)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["sample", "eval", "serve"])
def test_a_damaged_export(made: SimpleNamespace, tmp_path: Path, command: str, damage: str) -> None:
    shutil.copytree(made.integer, tmp_path / "copy")
    apply, wanted = DAMAGE[damage]
    apply(tmp_path / "copy", "model.onnx")
    options = {"sample": ("-o", tmp_path / "x.png"), "eval": ("--against", tmp_path / "copy"), "serve": ("--port", 0)}
    assert wanted in refused(tmp_path, command, tmp_path / "copy", *options[command])


def test_an_export_is_not_a_program(made: SimpleNamespace, tmp_path: Path) -> None:
    said = refused(tmp_path, "inspect", made.integer)
    assert "holds 'hqc-export'; expected 'hqc-program'" in said


@pytest.mark.parametrize("source", ["nothing-here", "no.such.module:build", "os:getcwd"])
def test_sources_that_cannot_be_traced(tmp_path: Path, source: str) -> None:
    assert refused(tmp_path, "trace", source, "-o", tmp_path / "x.hqc").startswith("source ")


# ---- refusals: where to write --------------------------------------------------------------------------------------


def _writing(made: SimpleNamespace, command: str, output: Path) -> tuple[object, ...]:
    """A quick run of each command that writes."""
    short = (*STEPS, "--calib-size", "1")
    return {
        "trace": ("trace", made.source, "-o", output),
        "ptq": ("ptq", made.program, "-o", output, *short),
        "qat": ("qat", made.program, "-o", output, *short, "--steps", "1", "--batch-size", "1"),
        "export": ("export", made.rtn, "-o", output),
        "sample": ("sample", made.program, "-o", output, *STEPS, "--labels", "1", "--per-class", "1"),
    }[command]


WRITING = ["trace", "ptq", "qat", "export", "sample"]


@pytest.mark.parametrize("command", WRITING)
def test_nothing_is_overwritten_without_force(made: SimpleNamespace, tmp_path: Path, command: str) -> None:
    output = tmp_path / "there"
    there = {"trace": made.program, "ptq": made.rtn, "qat": made.trained, "export": made.integer}
    if command in there:
        shutil.copytree(there[command], output)
    else:
        ok(*_writing(made, command, output))
    said = refused(tmp_path, *_writing(made, command, output))
    assert said == f"{output}: already exists. Give --force to replace it, or choose another name."
    (output / "manifest.json" if output.is_dir() else output).touch()
    ok(*_writing(made, command, output), "--force")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("command", WRITING[:-1])
def test_a_folder_of_the_user_is_not_replaced_even_with_force(
    made: SimpleNamespace, tmp_path: Path, command: str
) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    for force in ((), ("--force",)):
        said = refused(tmp_path, *_writing(made, command, output), *force)
        assert said == f"{output}: exists and was not written by hqc. Choose another name."


@pytest.mark.parametrize("command", WRITING[:-1])
def test_a_file_of_the_user_is_not_replaced_even_with_force(
    made: SimpleNamespace, tmp_path: Path, command: str
) -> None:
    output = tmp_path / "mine"
    output.write_text("years of work")
    said = refused(tmp_path, *_writing(made, command, output), "--force")
    assert said == f"{output}: exists and was not written by hqc. Choose another name."


@pytest.mark.parametrize("place", ["under a file", "in proc"])
@pytest.mark.parametrize("command", WRITING)
def test_places_that_cannot_be_written(
    made: SimpleNamespace, tmp_path: Path, command: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before any long work. Root is stopped by no permission: a path below a file, and one in /proc."""
    for work in ("capture.trace", "api.ptq", "api.qat", "export.artefact.prepare", "evaluation.sampling.sample_images"):
        monkeypatch.setattr(f"hqc.{work}", _raise(AssertionError("worked in vain")))
    (tmp_path / "file").write_text("")
    folder = {"under a file": tmp_path / "file", "in proc": Path("/proc/hqc-test")}[place]
    said = refused(tmp_path, *_writing(made, command, folder / "x"))
    assert str(folder) in said
    assert "cannot be written" in said


def _raise(error: BaseException) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk(made: SimpleNamespace, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    result = hqc(*_writing(made, command, tmp_path / "x"))
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.rglob("*")} <= {"x.training", "log.jsonl"}


def test_a_full_disk_as_safetensors_says_it(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("hqc.storage.save_file", _raise(error))
    said = refused(tmp_path, *_writing(made, "ptq", tmp_path / "x"))
    assert "could not be written (I/O error: No space left" in said


def test_a_full_disk_leaves_what_was_there(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made.rtn, tmp_path / "x")
    monkeypatch.setattr(os, "fsync", _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    refused(tmp_path, *_writing(made, "ptq", tmp_path / "x"), "--force")


# ---- refusals: numbers ---------------------------------------------------------------------------------------------


def test_nan_weights_are_found_by_trace(tmp_path: Path) -> None:
    pipeline = tiny_pipeline.tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.weight[0, 0, 0, 0] = float("nan")
    pipeline.save_pretrained(tmp_path / "pipeline")
    said = refused(tmp_path, "trace", tmp_path / "pipeline", "-o", tmp_path / "x.hqc")
    assert "NaN or infinite: conv_out.weight (1 in the first, at [0, 0, 0, 0])" in said


@pytest.mark.parametrize("command", ["ptq", "qat"])
def test_nan_while_calibrating(made: SimpleNamespace, tmp_path: Path, command: str) -> None:
    program = load_program(made.program)
    name = "conv_in.weight"
    broken = {**program.state, name: torch.full_like(program.state[name], float("nan"))}
    save_program(program.evolve(state=broken), tmp_path / "nan.hqc", pipeline=made.program / "pipeline")
    said = refused(tmp_path, command, tmp_path / "nan.hqc", "-o", tmp_path / "x.hqc", *STEPS, "--calib-size", "1")
    assert said.startswith("calibration at " if command == "ptq" else "choosing rotations at ")
    assert "met NaN or infinity at timestep 75. Its weight conv_in.weight has NaN" in said


# ---- the process ---------------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`hqc recipes list | head -1`."""
    command = [sys.executable, "-m", "hqc.cli", "recipes", "list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) in (0, 1)  # click's own status for it is 1
    process.stderr.close()


def test_version_and_help() -> None:
    assert ok("--version").stdout == "hqc, version 0.1.0\n"
    text = ok("--help").stdout
    commands = [line.split()[0] for line in text.partition("Commands:\n")[2].splitlines()]
    models = ["sample", "restore", "eval", "analyze", "compare", "compare-recipes"]
    models += ["bench", "serve", "bench-serve", "deploy"]
    made = ["trace", "explain", "inspect", "recipes", "search", "qr-adaptor"]
    made += ["ptq", "qat", "attach-lora", "export", "build-engine", "tune"]
    assert commands == [*made, *models, "doctor"]
    for command in commands:
        assert ok(command, "-h").stdout.startswith(f"Usage: main {command}")
