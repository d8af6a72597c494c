"""`hqc sample` and `hqc serve` of an exported pipeline, in processes that cannot import torch."""

import base64
import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_lite_pipeline import changed
from tiny_pipeline import traced_pipeline

import hqc
from hqc.cli import main
from hqc.lite import LitePipeline
from hqc.storage import save_program

RUNNER = [sys.executable, str(Path(__file__).with_name("draw_without_torch.py"))]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(hqc.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(*arguments: object) -> Iterator[str]:
    """The URL of a server in a process of its own; it ends by a signal, and quietly."""
    command = [*RUNNER, "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        if not said:
            pytest.fail(process.communicate()[1])
        yield next(word for word in said.split() if word.startswith("http"))
        process.terminate()
        _, complaints = process.communicate(timeout=60)
        assert (process.returncode, complaints) == (0, "")
    finally:
        process.kill()
        process.communicate()


def asked(url: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{url}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode("utf-8")


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def test_a_pipeline_is_served_without_torch(folders: dict[str, tuple[Path, Path]]) -> None:
    folder = folders["classes"][1]
    pipe = LitePipeline(folder, threads=1)
    with serving(folder) as url:
        with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
            health = json.load(answer)
        data = json.loads(asked(url, class_label=4, seed=7, num_inference_steps=3, n=2))["data"]
        euler = json.loads(asked(url, prompt="a three", seed=1, num_inference_steps=2, scheduler="euler"))["data"][0]
        stream = asked(url, class_label=4, seed=7, num_inference_steps=4, stream=True, partial_images=2)
    assert health["runtime"] == "onnxruntime"
    assert health["takes"]["schedulers"] == ["ddim", "dpmsolver++", "euler"]
    for i, one in enumerate(data):
        np.testing.assert_allclose(
            pixels(one["b64_json"]).astype(int), pipe.draw(4, seed=7 + i, steps=3).astype(int), rtol=0, atol=1
        )
    wanted = pipe.draw(3, seed=1, steps=2, scheduler="euler").astype(int)
    np.testing.assert_allclose(pixels(euler["b64_json"]).astype(int), wanted, rtol=0, atol=1)
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    kinds = [event["type"].partition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]


def test_prompts_are_served_without_torch(folders: dict[str, tuple[Path, Path]]) -> None:
    folder = folders["prompts"][1]
    with serving(folder) as url:
        found = json.loads(asked(url, prompt="a cat", negative_prompt="b", seed=3, num_inference_steps=2))["data"][0]
    wanted = LitePipeline(folder, threads=1).draw(prompt="a cat", negative_prompt="b", seed=3, steps=2).astype(int)
    np.testing.assert_allclose(pixels(found["b64_json"]).astype(int), wanted, rtol=0, atol=1)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)  # diffusers' Euler
@pytest.mark.parametrize("scheduler", [(), ("--scheduler", "euler")])
def test_a_grid_is_drawn_without_torch_as_with_it(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, scheduler: tuple[str, ...]
) -> None:
    source, folder = folders["classes"]
    options = ["--labels", "1,7", "--per-class", "2", "--num-inference-steps", "3", *scheduler]
    done = subprocess.run(
        [*RUNNER, "sample", str(folder), "-o", str(tmp_path / "lite.png"), *options],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    save_program(traced_pipeline("classes"), tmp_path / "classes", pipeline=source)
    found = CliRunner().invoke(main, ["sample", str(tmp_path / "classes"), "-o", str(tmp_path / "torch.png"), *options])
    assert found.exit_code == 0, found.output
    lite, torch = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("lite", "torch"))
    assert lite.shape == torch.shape
    title = 60  # the name of the model, which is another path, stands above the images
    assert np.abs(lite[title:] - torch[title:]).max() <= 1


def test_a_folder_whose_scheduler_needs_torch_is_drawn_from_with_another(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """As Stable Diffusion 1.5 is published, with a PNDMScheduler."""
    name = "scheduler/scheduler_config.json"
    pndm = changed(folders["prompts"][1], tmp_path, name, lambda data: data.update(_class_name="PNDMScheduler"))
    sample = [
        "sample",
        str(pndm),
        "-o",
        str(tmp_path / "x.png"),
        "--prompt",
        "a",
        "--per-prompt",
        "1",
        "--n-steps",
        "2",
    ]
    refused = CliRunner().invoke(main, sample)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("hqc: scheduler: the pipeline has a PNDMScheduler, which runs with torch alone. ")
    assert "ddim, dpmsolver++, euler (--scheduler)" in refused.stderr
    drawn = CliRunner().invoke(main, [*sample, "--scheduler", "ddim"])
    assert drawn.exit_code == 0, drawn.output
    with serving(pndm, "--scheduler", "ddim") as url:
        found = json.loads(asked(url, prompt="a cat", seed=3, num_inference_steps=2, guidance_scale=2.0))["data"][0]
    pipe = LitePipeline(pndm, threads=1, scheduler="ddim")
    wanted = pipe.draw(prompt="a cat", seed=3, steps=2, guidance_scale=2.0).astype(int)
    np.testing.assert_allclose(pixels(found["b64_json"]).astype(int), wanted, rtol=0, atol=1)


def test_prompts_that_are_cut_are_counted(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a\na cat and much more\n", encoding="utf-8")
    arguments = ["sample", str(folders["prompts"][1]), "-o", str(tmp_path / "x.png"), "--per-prompt", "1"]
    found = CliRunner().invoke(
        main, [*arguments, "--prompts", str(tmp_path / "words.txt"), "--num-inference-steps", "2"]
    )
    assert found.exit_code == 0, found.output
    assert "1 of 2 prompts are longer than its tokenizer takes: cut" in found.stderr


def test_prompts_are_drawn_with_the_guidance_of_their_pipeline(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    sample = ["sample", str(folders["prompts"][1]), "--prompt", "a cat", "--per-prompt", "1", "--n-steps", "2"]
    grids = []
    for number, guidance in enumerate(([], ["--guidance-scale", "7.5"], ["--guidance-scale", "1.5"])):
        found = CliRunner().invoke(main, [*sample, *guidance, "-o", str(tmp_path / f"{number}.png")])
        assert found.exit_code == 0, found.output
        grids.append(np.asarray(Image.open(tmp_path / f"{number}.png")))
    np.testing.assert_array_equal(grids[0], grids[1])
    assert (grids[0] != grids[2]).any()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "sample {} --runtime torch",
            "--runtime torch: {} is an exported pipeline: onnxruntime runs it. Leave it out.",
        ),
        ("sample {} --prompt cat", "--prompt: {} takes class labels (ClassConditionalLDMPipeline). Leave it out."),
        (
            "sample {} --lora-scale a=1",
            "LoRA a: is not attached, and none is. Attach it with `hqc export --pipeline --lora`.",
        ),
        (
            "sample {} --scheduler heun",
            "scheduler 'heun': unknown; there are ddim, dpmsolver++, euler. Use one of them.",
        ),
        ("sample {} --labels 10", "class 10: the model has the classes 0 to 9. Give one of them."),
        ("sample {} --num-inference-steps 101", "101 steps: expected 1 to 100, those of training. Ask for fewer."),
        ("serve {} --cache-dir c", "--cache-dir: {} is an exported pipeline, which keeps nothing there. Leave"),
        ("serve {} --runtime tensorrt", "--runtime tensorrt: {} is an exported pipeline: onnxruntime runs it."),
        ("eval {} --against digits", "{}: is an exported pipeline, which runs without torch. Give it to `hqc sample`"),
    ],
)
def test_what_does_not_apply_is_refused(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    monkeypatch.chdir(folders["classes"][1].parent)
    found = CliRunner().invoke(main, [word.format("classes") for word in line.split()])
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("hqc: " + said.format("classes"))
