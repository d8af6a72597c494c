"""A denoiser folder without a pipeline, the whole way on the command line."""

import json
from pathlib import Path

from command_line import hqc
from denoisers import denoiser

from hqc.runtimes import load


def test_a_transformer_from_folder_to_export(tmp_path: Path) -> None:
    denoiser("flux").save_pretrained(tmp_path / "flux")
    options = ("--condition-length", 5, "--latent-size", 8, "--json")
    traced = hqc("trace", tmp_path / "flux", *options, "-o", tmp_path / "a.hqc")
    assert json.loads(traced.stdout)["sites"] == 30

    few = ("--calib-size", 2, "--num-inference-steps", 2, "--bits", "w4a4")
    refused = hqc("ptq", tmp_path / "a.hqc", *few, "-o", tmp_path / "b.hqc")
    assert refused.exit_code == 2
    assert "Give --synthetic" in refused.stderr
    done = hqc("ptq", tmp_path / "a.hqc", *few, "--hadamard", "--synthetic", "-o", tmp_path / "b.hqc")
    assert done.exit_code == 0
    assert "noise and random conditions, not real ones" in done.output

    done = hqc("export", tmp_path / "b.hqc", "--target", "onnxruntime", "-o", tmp_path / "onnx")
    assert done.exit_code == 0
    model = load(tmp_path / "onnx")
    # Flux is given the scheduler's timesteps over 1000.
    assert 0 < min(model.plan.timesteps) < max(model.plan.timesteps) <= 1
    assert [spec.name for spec in model.session.inputs][-3:] == ["img_ids", "txt_ids", "guidance"]


def test_trained_on_noise(tmp_path: Path) -> None:
    denoiser("dit").save_pretrained(tmp_path / "dit")
    assert hqc("trace", tmp_path / "dit", "-o", tmp_path / "a.hqc").exit_code == 0
    few = ("--calib-size", 2, "--num-inference-steps", 2, "--steps", 2, "--batch-size", 2)
    done = hqc("qat", tmp_path / "a.hqc", "--synthetic", *few, "--json", "-o", tmp_path / "b.hqc")
    assert done.exit_code == 0
    summary = json.loads(done.stdout)
    assert summary["updates"] == 2
    assert summary["calibrated_on"] == "noise and random conditions, not real ones"


def test_options_that_do_not_belong(tmp_path: Path) -> None:
    refused = hqc("trace", "digits", "--revision", "main", "-o", tmp_path / "x.hqc")
    assert refused.exit_code == 2
    assert "source 'digits': takes no --revision" in refused.stderr
    assert not (tmp_path / "x.hqc").exists()
