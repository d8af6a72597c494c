"""`sample`, `eval` and `serve` with `--runtime torch-int8`, of a tiny class-conditional pipeline."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from command_line import hqc, ok
from PIL import Image
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.runtimes.integer.cpu import compiler
from hqc.storage import save_program

STEPS = ("--n-steps", "3")
INT8 = ("--runtime", "torch-int8")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("int8")
    save_program(traced_pipeline("classes"), work / "captured.hqc", pipeline=saved_pipeline("classes"))
    ok("ptq", work / "captured.hqc", "-o", work / "rtn.hqc", *STEPS, "--calib-size", "2", "--bits", "w8a8")
    return work / "rtn.hqc"


@pytest.fixture(autouse=True)
def _kept_code(native_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "native_cache", lambda: native_cache)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.int64)


def test_pictures_are_those_of_torch(quantised: Path, tmp_path: Path) -> None:
    common = ("sample", quantised, *STEPS, "--labels", "1,7", "--per-class", "2", "--seed", "5")
    ok(*common, *INT8, "-o", tmp_path / "int8.png")
    ok(*common, "--runtime", "torch", "-o", tmp_path / "torch.png")
    found, wanted = pixels(tmp_path / "int8.png"), pixels(tmp_path / "torch.png")
    assert found.shape == wanted.shape
    assert wanted.std() > 1
    assert float(np.abs(found - wanted).mean()) <= 1  # a value on a rounding boundary may flip


def test_figures_against_the_float_model(quantised: Path) -> None:
    common = ("eval", quantised, "--against", quantised.with_name("captured.hqc"), *STEPS, "--json")
    common = (*common, "--images", "65", "--gain-images", "0", "--labels", "3")
    found, wanted = (json.loads(ok(*common, "--runtime", name).stdout) for name in ("torch-int8", "torch"))
    assert found["psnr_db"] == pytest.approx(wanted["psnr_db"], abs=1)
    assert found["latent_cosine"] == pytest.approx(wanted["latent_cosine"], abs=1e-3)


def test_it_is_served_and_keeps_its_code_in_the_cache_folder(quantised: Path, native_cache: Path) -> None:
    command = [sys.executable, "-m", "hqc.cli", "serve", str(quantised), *INT8, "--cache-dir", str(native_cache)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(quantised.parent / "unused")}
    process = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving at http://127.0.0.1:"), process.stderr and process.stderr.read()
        with httpx.Client(base_url=line.split()[2], timeout=60, trust_env=False) as client:
            assert client.get("/health").json()["runtime"] == "torch-int8"
            body = {"prompt": "a handwritten 7", "num_inference_steps": 3, "seed": 3, "n": 2}
            answer = client.post("/v1/images/generations", json=body)
            assert answer.status_code == 200, answer.text
            for made in answer.json()["data"]:
                with Image.open(io.BytesIO(base64.b64decode(made["b64_json"]))) as image:
                    assert image.size == (32, 32)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        _, stderr = process.communicate()
    assert "Traceback" not in stderr
    assert not (quantised.parent / "unused" / "hqc").exists()


def test_a_cache_that_the_runtime_does_not_take_is_refused_before_weights_are_read(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("hqc.runtimes.load", read)
    said = hqc("serve", quantised, "--cache-dir", tmp_path / "c")
    assert said.exit_code == 2
    assert said.stderr == (
        "hqc: --cache-dir: is for onnxruntime, tensorrt, torch-int8, and torch runs this model. Leave it out.\n"
    )


def test_a_float_program_is_refused(quantised: Path, tmp_path: Path) -> None:
    said = hqc("sample", quantised.with_name("captured.hqc"), *INT8, "-o", tmp_path / "x.png")
    assert said.exit_code == 2
    assert said.stderr.startswith("hqc: runtime torch-int8: runs integer products and the program is not quantised")
    assert not list(tmp_path.iterdir())
