"""`sample`, `eval` and `serve` of models that are not hqc's own: prompts, classes or nothing, or one line at once."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import hqc, ok
from denoisers import denoiser
from PIL import Image
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.storage import save_program

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]
FEW = ("--n-steps", "2")


def refused(folder: Path, *arguments: object) -> str:
    """The one line of a refusal; the folder stays empty."""
    result = hqc(*arguments)
    assert result.exit_code == 2, result.stdout
    assert result.stderr.startswith("hqc: ")
    assert result.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []
    return result.stderr.removeprefix("hqc: ").strip()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A program of each kind, and a quantised export of the text model."""
    work = tmp_path_factory.mktemp("pipelines")
    ok("trace", saved_pipeline("ddpm"), "-o", work / "ddpm.hqc")
    for name in ("dit", "sd15", "upscale"):
        save_program(traced_pipeline(name), work / f"{name}.hqc", pipeline=saved_pipeline(name))
    denoiser("sd15").save_pretrained(work / "alone")
    ok("trace", work / "alone", "-o", work / "alone.hqc")
    ok("ptq", work / "sd15.hqc", "--synthetic", "--calib-size", "2", *FEW, "-o", work / "rtn.hqc")
    ok("export", work / "rtn.hqc", "--target", "onnxruntime", "-o", work / "onnx")
    (work / "prompts.txt").write_text("a cat\nb\n", encoding="utf-8")
    names = {name: work / f"{name}.hqc" for name in ("ddpm", "dit", "sd15", "upscale", "alone", "rtn")}
    return SimpleNamespace(**names, onnx=work / "onnx", prompts=work / "prompts.txt")


def test_pictures_of_every_kind(made: SimpleNamespace, tmp_path: Path) -> None:
    ok("sample", made.ddpm, *FEW, "--per-class", "12", "-o", tmp_path / "ddpm.png")
    ok("sample", made.dit, *FEW, "--labels", "0,999", "--per-class", "1", "-o", tmp_path / "dit.png")
    both = ("--compare-with", made.sd15, "--prompts", made.prompts, "--negative-prompt", "dog")
    ok("sample", made.onnx, *FEW, *both, "--per-prompt", "2", "-o", tmp_path / "sd.png")
    ok("sample", made.sd15, *FEW, "--prompt", "a cat", "--per-prompt", "1", "-o", tmp_path / "one.png")
    sizes = {}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            sizes[path.stem] = image.size
    assert set(sizes) == {"ddpm", "dit", "sd", "one"}
    assert sizes["ddpm"][1] > sizes["one"][1]  # twelve images without labels are two rows


def test_figures_without_digits(made: SimpleNamespace) -> None:
    common = ("--images", "3", *FEW, "--json")
    said = json.loads(ok("eval", made.onnx, "--against", made.sd15, "--prompts", made.prompts, *common).stdout)
    assert 5 < said["psnr_db"] < 80
    assert 0 < said["latent_cosine"] < 1
    assert said["protocol"]["prompts"].startswith("2 prompts, sha256 ")
    assert not {"accuracy", "inception_score", "fid_reference"} & set(said)
    same = json.loads(ok("eval", made.ddpm, "--against", made.ddpm, *common).stdout)
    assert (same["identical_images"], same["psnr_db"], same["latent_cosine"]) == (3, None, None)
    assert said["trajectory"]["num_images"] == 3  # no more than there are images
    assert 0.5 < said["trajectory"]["gain"] < 1.5
    assert said["trajectory"]["gain_by_timestep"] != same["trajectory"]["gain_by_timestep"] == [1.0, 1.0]
    assert same["protocol"]["guidance_scale"] == 1.0  # none was typed, and it has none
    text = ok("eval", made.ddpm, "--against", made.ddpm, "--images", "2", *FEW).stdout
    assert "psnr_db           ∞" in text
    assert "latent_cosine     –" in text
    assert text.count("1.0000 · 1.0000") == 2


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("ddpm", ("--labels", "0-1"), "--labels: {} takes neither labels nor prompts (DDPMPipeline). Leave it out."),
        ("ddpm", ("--prompt", "a cat"), "--prompt: {} takes neither labels nor prompts (DDPMPipeline). Leave it out."),
        ("dit", ("--prompt", "a cat"), "--prompt: {} takes class labels (DiTPipeline). Leave it out."),
        ("sd15", ("--labels", "1"), "--labels: {} takes prompts (StableDiffusionPipeline). Leave it out."),
        ("sd15", (), "{}: takes prompts (StableDiffusionPipeline). Give --prompt TEXT or --prompts FILE."),
        ("sd15", ("--prompt", " "), "--prompt: is empty. Say what to draw."),
        (
            "upscale",
            ("--prompt", "a"),
            "pipeline StableDiffusionUpscalePipeline: needs image, which hqc does not give. "
            "Run it from Python: set its unet or transformer to hqc.load(…).as_denoiser().",
        ),
        (
            "alone",
            (),
            "alone.hqc: has no pipeline around its denoiser. Trace a pipeline folder, or use as_denoiser().",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("command", ["sample", "eval"])
def test_what_does_not_apply_is_one_line_before_weights_are_read(
    made: SimpleNamespace,
    command: str,
    model: str,
    options: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hqc.runtimes.model.load_program", None)
    path = getattr(made, model)
    more = {"sample": ("-o", tmp_path / "x.png"), "eval": ("--against", path)}[command]
    assert refused(tmp_path, command, path, *more, *FEW, *options) == said.format(path)


def test_what_the_pipeline_does_not_take_is_one_line(made: SimpleNamespace, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "x.png", "--per-class", "1")
    said = refused(tmp_path, "sample", made.ddpm, *output, *FEW, "--guidance-scale", "3")
    assert said == "--guidance-scale 3: DDPMPipeline takes none. Leave it out."
    said = refused(tmp_path, "sample", made.dit, *output, *FEW, "--eta", "0.5")
    assert said == "--eta 0.5: DiTPipeline takes none. Leave it out."
    said = refused(tmp_path, "sample", made.dit, *output, *FEW, "--labels", "1000")
    assert said == "class 1000: the model has the classes 0 to 999. Give one of them."
    said = refused(tmp_path, "sample", made.ddpm, *output, "--n-steps", "500")
    assert said.startswith("--num-inference-steps 500: DDPMScheduler cannot take them")


def test_a_cut_prompt_is_told(made: SimpleNamespace, tmp_path: Path) -> None:
    long = ("--prompt", "a cat on a mat", "--prompt", "b")
    result = ok("sample", made.sd15, *FEW, *long, "--per-prompt", "1", "-o", tmp_path / "x.png")
    assert "1 of 2 prompts are longer than its tokenizer takes: cut" in result.stderr


def test_a_server_that_could_never_answer_does_not_start(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hqc.runtimes.model.load_program", None)
    assert "needs image, which hqc does not give" in refused(tmp_path, "serve", made.upscale, "--port", "0")
    assert "has no pipeline around its denoiser" in refused(tmp_path, "serve", made.alone, "--port", "0")


def test_a_text_model_is_served(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi.testclient import TestClient

    answers = []

    def run(app: object, **_: object) -> None:
        with TestClient(app, base_url="http://localhost") as client:  # type: ignore[arg-type]
            body = {"prompt": "a cat", "seed": 1, "num_inference_steps": 2}
            answers.append(client.get("/health").json()["takes"]["kind"])
            answers.append(client.post("/v1/images/generations", json=body).status_code)

    monkeypatch.setattr("hqc.serving.server.serve", run)
    ok("serve", made.onnx, "--port", "0")
    assert answers == ["prompt", 200]
