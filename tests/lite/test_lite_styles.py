"""LoRAs beside the products of an exported pipeline, their scales by request: the images of the pipeline with torch."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from lora_files import layers_of, save_lora, tensors
from PIL import Image
from starlette.testclient import TestClient
from tiny_pipeline import saved_pipeline, traced_pipeline

import hqc
from hqc.cli import main
from hqc.errors import ArtefactError, EvaluationError
from hqc.export.pipeline_folder import export_pipeline
from hqc.lite import LitePipeline
from hqc.lite.styles import attached_scales
from hqc.program import Program
from hqc.serving.app import Served, create_app
from hqc.serving.backend import Drawing
from hqc.serving.pipelines import PipelineBackend
from hqc.serving.tickets import Call, Task

GREY_LEVELS = 1  # as of test_lite_pipeline: schedulers of two libraries round differently
PLAIN = Drawing(4, None, "", 3, 4, 1.5)
ASKED = [
    PLAIN,
    *(replace(PLAIN, loras=loras) for loras in ((("ink", 0.0),), (("ink", 1.5), ("oil", -0.5)))),
    replace(PLAIN, guidance_scale=1.0, loras=(("oil", 2.0),)),
]


@pytest.fixture(scope="module")
def styled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Program]:
    """The program with two LoRAs, attached at 0.8 and at 0, captured or quantised."""
    work = tmp_path_factory.mktemp("files")

    def made(stage: str) -> Program:
        program = traced_pipeline("classes")
        files = {
            name: save_lora(work / f"{name}.safetensors", tensors(layers_of(program, seed=seed), "bare"))
            for seed, name in enumerate(("ink", "oil"))
        }
        if stage == "quantised":
            few = {"calibrate_activations.samples": 2, "sampler.num_inference_steps": 2}
            program = hqc.ptq(program, "rtn", "w4a4", settings=few)
        return hqc.attach_loras(program, [f"ink={files['ink']}:0.8", f"oil={files['oil']}:0"])

    return made


@pytest.fixture(scope="module")
def exported(styled: Callable[[str], Program], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """(the same export alone, the whole pipeline) of a program, each made once."""
    found: dict[str, Path] = {}

    def folder(stage: str) -> Path:
        if stage not in found:
            found[stage], program = tmp_path_factory.mktemp(stage), styled(stage)
            target: Any = "onnxruntime" if stage == "quantised" else "portable"
            source = saved_pipeline("classes")
            hqc.export_program(program, target, found[stage] / "alone", pipeline=source)
            export_pipeline(program, target, found[stage] / "whole", pipeline=source)
        return found[stage]

    return folder


def drawn(backend: Any, drawing: Drawing) -> np.ndarray:
    """The image of a backend without an engine."""
    with backend.around():
        steps, output = backend.begin(drawing), None
        while True:
            try:
                wanted: Call | Task = steps.send(output)
            except StopIteration as end:
                return np.asarray(end.value)
            output = wanted.run() if isinstance(wanted, Task) else backend.denoise([wanted])[0]


@pytest.mark.parametrize("stage", ["captured", "quantised"])
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_images_are_those_of_the_server_with_torch(stage: str, exported: Callable[[str], Path]) -> None:
    pipe = LitePipeline(exported(stage) / "whole", threads=1)
    with_torch = PipelineBackend(hqc.load(exported(stage) / "alone", threads=1).pipeline())
    assert pipe.loras == with_torch.loras == ("ink", "oil")
    images = [drawn(pipe, drawing) for drawing in ASKED]
    for found, drawing in zip(images, ASKED, strict=True):
        apart = np.abs(found.astype(int) - drawn(with_torch, drawing))
        assert apart.max() <= GREY_LEVELS
        assert (apart > 0).mean() < 0.01
    assert len({image.tobytes() for image in images}) == len(images)
    attached = replace(PLAIN, loras=(("ink", 0.8), ("oil", 0.0)))
    np.testing.assert_array_equal(drawn(pipe, attached), images[0])


def test_styles_share_calls(exported: Callable[[str], Path]) -> None:
    pipe = LitePipeline(exported("quantised") / "whole", threads=1)
    for together, drawing in zip(pipe.draw_all(ASKED), ASKED, strict=True):
        np.testing.assert_array_equal(together, drawn(pipe, drawing))  # integer kernels: to the bit


def test_requests_choose_styles(exported: Callable[[str], Path]) -> None:
    pipe = LitePipeline(exported("quantised") / "whole", threads=1)
    body = {"class_label": 4, "seed": 3, "num_inference_steps": 4, "guidance_scale": 1.5}
    with TestClient(create_app([Served(pipe, "digits", "onnxruntime")]), base_url="http://127.0.0.1") as client:
        assert client.get("/health").json()["takes"]["loras"] == ["ink", "oil"]
        for drawing in ASKED[:3]:
            answer = client.post("/v1/images/generations", json={**body, "loras": dict(drawing.loras)})
            assert answer.status_code == 200, answer.text
            png = base64.b64decode(answer.json()["data"][0]["b64_json"])
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), drawn(pipe, drawing))
        refused = client.post("/v1/images/generations", json={**body, "loras": {"chalk": 1.0}})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "loras"


def test_draw_and_the_command_line(
    exported: Callable[[str], Path], styled: Callable[[str], Program], tmp_path: Path
) -> None:
    folder = exported("captured") / "whole"
    pipe = LitePipeline(folder, threads=1)
    np.testing.assert_array_equal(pipe.draw(4, seed=3, steps=4, loras={"ink": 0.0}), drawn(pipe, ASKED[1]))
    with pytest.raises(EvaluationError, match="LoRA chalk: is not attached; there are ink, oil"):
        pipe.draw(4, loras={"chalk": 1.0})
    line = ["sample", str(folder), "--labels", "4", "--per-class", "1", "--num-inference-steps", "2"]
    for name, scales in {"plain": [], "ink": ["--lora-scale", "ink=0"], "bad": ["--lora-scale", "chalk=1"]}.items():
        found = CliRunner().invoke(main, [*line, "-o", str(tmp_path / f"{name}.png"), *scales])
        assert found.exit_code == (2 if name == "bad" else 0), found.output
    assert "LoRA chalk: is not attached; there are ink, oil" in found.stderr
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "ink.png").read_bytes()


def test_the_export_says_its_styles(tmp_path: Path) -> None:
    program = traced_pipeline("classes")
    hqc.save_program(program, tmp_path / "classes", pipeline=saved_pipeline("classes"))
    file = save_lora(tmp_path / "ink.safetensors", tensors(layers_of(program), "bare"))
    line = ["export", str(tmp_path / "classes"), "-o", str(tmp_path / "whole"), "--pipeline", "--target", "portable"]
    found = CliRunner().invoke(main, [*line, "--lora", f"{file}:0.5"])
    assert found.exit_code == 0, found.output
    assert "lora     ink (ink.safetensors): input lora_scale_ink, 0.5 unless given" in found.output
    assert LitePipeline(tmp_path / "whole").loras == ("ink",)


@pytest.mark.parametrize("scale", [None, "1", True, float("nan")])
def test_a_manifest_without_a_scale_is_refused(scale: Any, tmp_path: Path) -> None:
    manifest = json.loads(json.dumps({"inputs": [{"name": "sample"}, {"name": "lora_scale_a", "default": scale}]}))
    with pytest.raises(ArtefactError, match="says no scale of the LoRA a"):
        attached_scales(manifest, tmp_path)
