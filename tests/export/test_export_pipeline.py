"""`hqc export --pipeline`: what is written for the targets, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from text_pipelines import save_text_pipeline
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.cli import main
from hqc.errors import ArtefactError, ExportError
from hqc.export.conditioning import write_tokenizer
from hqc.export.files import SCHEDULER_FILE
from hqc.export.interface import Interface, interface_for
from hqc.export.pipeline_folder import export_pipeline, require_pipeline
from hqc.lite import LitePipeline
from hqc.program import InputSpec
from hqc.runtimes import load
from hqc.storage import save_program


@pytest.fixture(scope="module")
def source() -> Path:
    return saved_pipeline("classes")


@pytest.fixture(scope="module")
def captured(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "tiny.hqc"
    save_program(traced_pipeline("classes"), folder, pipeline=source)
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_writes_a_pipeline_and_says_its_parts(captured: Path, tmp_path: Path) -> None:
    found = run("export", captured, "-o", tmp_path / "x", "--pipeline", "--one-timestep", "--json")
    assert found.exit_code == 0, found.output
    assert "scheduler" not in found.stderr
    data = json.loads(found.stdout)
    assert data["parts"] == ["class_embedder", "scheduler", "unet", "vae_decoder"]
    assert data["target"] == "onnxruntime"
    graph = onnx.load(str(tmp_path / "x" / "unet" / "model.onnx"), load_external_data=False).graph
    assert graph.output[0].name == "out_sample"
    timestep = next(value for value in graph.input if value.name == "timestep")
    assert [dim.dim_value for dim in timestep.type.tensor_type.shape.dim] == [1]  # as optimum gives it

    with pytest.raises(ArtefactError) as error:
        load(tmp_path / "x")
    assert "is an exported pipeline, which runs without torch. Give it to `hqc sample`" in error.value.line
    assert len(error.value.line) <= 300

    again = run("export", captured, "-o", tmp_path / "x", "--pipeline")
    assert again.exit_code == 2
    assert "already exists" in again.stderr


def test_the_command_says_which_schedulers_run_without_torch(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "pndm")
    file = tmp_path / "pndm" / SCHEDULER_FILE
    config = {**json.loads(file.read_text(encoding="utf-8")), "_class_name": "PNDMScheduler"}
    file.write_text(json.dumps(config), encoding="utf-8")
    save_program(traced_pipeline("classes"), tmp_path / "tiny.hqc", pipeline=tmp_path / "pndm")
    found = run("export", tmp_path / "tiny.hqc", "-o", tmp_path / "x", "--pipeline")
    assert found.exit_code == 0, found.output
    assert "x: scheduler: the pipeline has a PNDMScheduler, which runs with torch alone. Ask for" in found.stderr
    assert "ddim, dpmsolver++, euler (--scheduler)" in found.stderr


def test_a_quantised_denoiser_under_hqcs_names(captured: Path, tmp_path: Path) -> None:
    made = run("ptq", captured, "-o", tmp_path / "q", "--recipe", "rtn", "--calib-size", 2, "--num-inference-steps", 2)
    assert made.exit_code == 0, made.output
    found = run("export", tmp_path / "q", "-o", tmp_path / "x", "--pipeline", "--names", "hqc", "--force")
    assert found.exit_code == 0, found.output
    assert "parts    class_embedder, scheduler, unet, vae_decoder" in found.stdout
    assert str(tmp_path / "x" / "unet") in found.stdout  # not the place where it was made
    graph = onnx.load(str(tmp_path / "x" / "unet" / "model.onnx"), load_external_data=False).graph
    assert (graph.input[0].name, graph.output[0].name) == ("sample", "output")
    manifest = json.loads((tmp_path / "x" / "unet" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["plan"]["quantised"] > 0
    assert (tmp_path / "x" / "unet" / "config.json").is_file()
    image = LitePipeline(tmp_path / "x", threads=1).draw(3, seed=1, steps=2)
    pipe = load(tmp_path / "x" / "unet").session  # the same denoiser, by itself
    assert image.shape == (32, 32)
    assert pipe.name == "onnxruntime"


def edited(source: Path, tmp_path: Path, change: Any) -> Path:
    """A copy with another model_index.json."""
    copy = tmp_path / "edited"
    for path in source.rglob("*"):
        if path.is_file():
            (to := copy / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    index = json.loads((copy / "model_index.json").read_text(encoding="utf-8"))
    change(index)
    (copy / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return copy


def test_what_cannot_be_exported_whole(source: Path, tmp_path: Path) -> None:
    program = traced_pipeline("classes")
    with pytest.raises(ExportError, match="--pipeline: is not for target tensorrt"):
        require_pipeline(program, source, "tensorrt")
    with pytest.raises(ExportError, match="--pipeline: the program was not traced from a pipeline"):
        require_pipeline(program, None, "portable")
    with pytest.raises(ExportError, match="takes a denoiser; the program is a half of an autoencoder"):
        require_pipeline(traced_pipeline("classes", "vae-decoder"), source, "portable")
    vq = edited(source, tmp_path, lambda index: index.update(vae=["diffusers", "VQModel"]))
    with pytest.raises(ExportError, match="has a VQModel as its vae; expected AutoencoderKL"):
        require_pipeline(program, vq, "portable")
    (vq / "scheduler" / "scheduler_config.json").unlink()
    (vq / "model_index.json").write_bytes((source / "model_index.json").read_bytes())
    with pytest.raises(ExportError, match="has no scheduler/scheduler_config"):
        require_pipeline(program, vq, "portable")


def test_pipelines_of_other_classes_are_refused() -> None:
    with pytest.raises(ExportError) as error:
        require_pipeline(traced_pipeline("ddpm"), saved_pipeline("ddpm"), "portable")
    assert error.value.line.startswith("pipeline DDPMPipeline: is none of ClassConditionalLDMPipeline, ")
    assert error.value.line.endswith("Export the denoiser alone, without --pipeline.")


def test_a_safety_checker_is_not_left_out_silently(tmp_path: Path) -> None:
    source, program = saved_pipeline("sd15"), traced_pipeline("sd15")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    checked = edited(source, tmp_path, lambda index: index.update(safety_checker=checker))
    with pytest.raises(ExportError) as error:
        export_pipeline(program, "portable", tmp_path / "x", pipeline=checked)
    assert "has a safety_checker, which is not exported. Set safety_checker to [null, null] in its" in error.value.line
    assert not (tmp_path / "x").exists()


def test_a_condition_of_another_length_is_refused(tmp_path: Path) -> None:
    source = shutil.copytree(saved_pipeline("sd15"), tmp_path / "pipeline")
    settings = source / "tokenizer" / "tokenizer_config.json"
    read = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**read, "model_max_length": 4}), encoding="utf-8")
    with pytest.raises(
        ExportError, match=r"denoiser: takes a condition \['N', 5, 32\]; the text encoder gives \['N', 4, 32\]"
    ):
        export_pipeline(traced_pipeline("sd15"), "portable", tmp_path / "x", pipeline=source)
    assert [path.name for path in tmp_path.iterdir() if "x" in path.name] == []


def test_a_tokenizer_without_the_librarys_form_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    source = save_text_pipeline("sd15", tmp_path) / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(source)
    found = write_tokenizer(tokenizer, source, tmp_path / "written")
    assert found.shape[1] == 5

    class Other:
        model_max_length, backend_tokenizer = 5, None

    with pytest.raises(ExportError, match="a Other has no form for the library tokenizers"):
        write_tokenizer(Other(), source, tmp_path / "other")


def test_halves_of_an_autoencoder_have_optimums_names() -> None:
    inputs = (InputSpec("sample", ("N", 4, 8, 8)),)
    decoder = interface_for("optimum", inputs, {}, "AutoencoderKL.decoder")
    assert decoder == Interface({"sample": "latent_sample"}, "sample")
    assert interface_for("optimum", inputs, {}, "AutoencoderKL.encoder") == Interface({}, "latent_parameters")
    assert interface_for("hqc", inputs, {}, "AutoencoderKL.decoder") == Interface()
