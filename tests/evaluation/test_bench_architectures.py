"""`hqc bench arch:NAME` in one command, and what each kind of source is calibrated on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from contenders_here import run_here
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.capture import trace
from hqc.capture.architectures import ARCHITECTURES, Architecture
from hqc.cli import main
from hqc.evaluation.bench.models import calibration_of
from hqc.program import Program
from hqc.storage import save_program

TINY = Architecture(
    "UNet2DConditionModel",
    {
        "sample_size": 8,
        "block_out_channels": (32,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    },
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hqc.capture.architectures.ARCHITECTURES", {**ARCHITECTURES, "tiny": TINY})


def test_one_command_from_a_name_to_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    command = ("bench", "arch:tiny", "--bits", "W4A4", "--against", "onnxruntime-fp32", "--json")
    more = ("--runs", "2", "--warm-up", "1", "--threads", "1", "--n-steps", "2", "--calib-size", "2")
    done = CliRunner(catch_exceptions=False).invoke(main, [*command, *more, "--work-dir", str(tmp_path / "w")])
    assert done.exit_code == 0, done.stderr
    said, both = json.loads(done.stdout), ["hqc", "onnxruntime-fp32"]
    assert said["model"] == "arch:tiny"
    assert said["quantisation"] == "w4a4 rtn + Hadamard"
    assert said["protocol"]["calibration"] == "2 images, 2 timesteps, noise"
    assert list(said["speedup"]) == list(said["speedup_spread"]) == both[1:]
    assert said["speedup"]["onnxruntime-fp32"] > 0
    assert all(list(said[name]) == both for name in ("size_bytes", "resident_bytes", "milliseconds", "load_seconds"))
    assert all({"median", "p10", "p90", "runs"} == entry.keys() for entry in said["milliseconds"].values())
    assert said["size_bytes"]["hqc"] < said["size_bytes"]["onnxruntime-fp32"]
    assert said["error_to_float"]["onnxruntime-fp32"] < 1e-5 < 1e-3 < said["error_to_float"]["hqc"] < 1
    assert [stage["name"] for stage in said["stages"]][:3] == ["float.hqc", "quantised.hqc", "integer"]
    assert said["machine"]
    # The work folder is known again by the name alone.
    again = CliRunner(catch_exceptions=False).invoke(main, [*command, *more, "--work-dir", str(tmp_path / "w")])
    assert "float.hqc: 0.0 s, kept from an earlier run" in again.stderr


def test_an_unknown_architecture_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner(catch_exceptions=False).invoke(main, ["bench", "arch:ldm4-imagnet", "--chart", "c.svg"])
    assert done.exit_code == 2
    assert done.stderr.startswith(
        "hqc: source 'arch:ldm4-imagnet': names no architecture (nearest: arch:ldm4-imagenet)"
    )
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_each_source_is_calibrated_on(captured: Callable[[str], Program], tmp_path: Path) -> None:
    programs = {
        "arch": (trace("arch:tiny"), None),
        "module": (captured("two_sites"), None),
        "pipeline": (traced_pipeline("classes"), saved_pipeline("classes")),
    }
    found = {}
    for name, (program, pipeline) in programs.items():
        save_program(program, tmp_path / f"{name}.hqc", pipeline=pipeline)
        task, found[name] = calibration_of(program, tmp_path / f"{name}.hqc")
        assert task.timesteps(2)
    assert found == {"arch": "noise", "module": "noise", "pipeline": "the pipeline's conditions"}
