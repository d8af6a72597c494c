"""`--prompts` and `--synthetic` on the command line: ptq, qat and analyze of a tiny text-conditional pipeline."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from command_line import hqc
from denoisers import denoiser
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.capture.architectures import ARCHITECTURES, Architecture
from hqc.storage import load_program, save_program

FEW = ("--n-steps", "2", "--calib-size", "2")
NOISE = "noise and random conditions, not real ones"
COMMANDS = {
    "ptq": ("ptq", "-o", "OUT.hqc"),
    "qat": ("qat", "--steps", "1", "--batch-size", "1", "-o", "OUT.hqc"),
    "analyze": ("analyze", "--no-sensitivity", "-o", "OUT.html"),
}


def run(command: str, program: Path, folder: Path, *more: object) -> Result:
    name, *options = COMMANDS[command]
    options = [option.replace("OUT", str(folder / command)) for option in options]
    return hqc(name, program, *options, *FEW, *more)


def said(result: Result) -> str:
    """What the report says that it was calibrated on."""
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    return str(data.get("calibrated_on") or data["measured"]["calibrated_on"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    work = tmp_path_factory.mktemp("prompts")
    folder = saved_pipeline("sd15")
    save_program(traced_pipeline("sd15"), work / "text.hqc", pipeline=folder)
    save_program(traced_pipeline("classes"), work / "classes.hqc", pipeline=saved_pipeline("classes"))
    prompts = work / "prompts.txt"
    prompts.write_text("a cat\nb\n", encoding="utf-8")
    return SimpleNamespace(text=work / "text.hqc", classes=work / "classes.hqc", prompts=prompts, folder=folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_conditions_that_are_asked_for(made: SimpleNamespace, command: str, tmp_path: Path) -> None:
    assert said(run(command, made.text, tmp_path, "--json", "--prompts", made.prompts)).startswith("2 prompts (sha256 ")
    if command != "qat":  # which asks as ptq does
        assert said(run(command, made.text, tmp_path, "--json", "--force", "--synthetic")) == NOISE
    assert said(run(command, made.classes, tmp_path, "--json", "--force")) == "the pipeline's conditions"


def test_prompts_decide_the_scales(made: SimpleNamespace, tmp_path: Path) -> None:
    def table(*more: object) -> list[float]:
        result = run("ptq", made.text, tmp_path, "--force", *more)
        assert result.exit_code == 0, result.stderr
        site = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"  # what the condition enters
        return load_program(tmp_path / "ptq.hqc").state[f"{site}.activation_scale_table"].tolist()  # type: ignore[no-any-return]

    other = tmp_path / "other.txt"
    other.write_text("zebra\nxyz\n", encoding="utf-8")
    first = table("--prompts", made.prompts)
    assert first == table("--prompts", made.prompts)
    assert first != table("--prompts", other)
    assert first != table("--synthetic")


def test_the_report_says_what_it_was_measured_on(made: SimpleNamespace, tmp_path: Path) -> None:
    result = run("analyze", made.text, tmp_path, "--prompts", made.prompts)
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "analyze.html").read_text(encoding="utf-8")
    assert "<dt>calibrated on</dt><dd>2 prompts (sha256 " in page


@pytest.mark.parametrize("command", COMMANDS)
def test_without_either_a_text_model_is_refused(made: SimpleNamespace, command: str, tmp_path: Path) -> None:
    result = run(command, made.text, tmp_path)
    assert result.exit_code == 2
    assert "has no class embedder" in result.stderr
    assert "Give --synthetic, --prompts FILE if it has a text encoder" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("content", "more", "wanted"),
    [
        (b"\n \n", (), "holds no prompt. Write one prompt a line."),
        (b"caf\xe9", (), "is no UTF-8 text (byte 3 is 0xe9). Save it as UTF-8."),
        (b"a cat", ("--synthetic",), "--prompts: and --synthetic exclude each other. Give one of them."),
        (None, (), "cannot be read (No such file or directory). Check the path."),
    ],
    ids=["empty", "latin-1", "both", "missing"],
)
def test_prompts_that_are_refused(
    made: SimpleNamespace,
    command: str,
    content: bytes | None,
    more: tuple[str, ...],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hqc.storage.load_program", None)  # before anything is loaded
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    out.mkdir()
    if content is not None:
        path.write_bytes(content)
    result = run(command, made.text, out, "--prompts", path, *more)
    assert result.exit_code == 2
    assert result.stderr.startswith("hqc: ")
    assert result.stderr.endswith(f"{wanted}\n")
    assert result.stderr.count("\n") == 1
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_pipelines_that_encode_no_prompts(made: SimpleNamespace, command: str, tmp_path: Path) -> None:
    result = run(command, made.classes, tmp_path, "--prompts", made.prompts)
    assert result.exit_code == 2
    assert "the ClassConditionalLDMPipeline has no text encoder to encode prompts with" in result.stderr
    assert list(tmp_path.iterdir()) == []


# ---- sources without a pipeline ------------------------------------------------------------------------------------


def test_a_named_architecture_is_analysed_on_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "sample_size": 8,
        "block_out_channels": (32,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    }
    tiny = Architecture("UNet2DConditionModel", options, 3)
    monkeypatch.setattr("hqc.capture.architectures.ARCHITECTURES", {**ARCHITECTURES, "tiny": tiny})
    program = tmp_path / "tiny.hqc"
    assert hqc("trace", "arch:tiny", "--outliers", "-o", program).exit_code == 0
    result = run("analyze", program, tmp_path, "--json")
    assert said(result) == NOISE
    assert len(json.loads(result.stdout)["sites"]) == len(list(load_program(program).sites()))
    assert f"<dd>{NOISE}</dd>" in (tmp_path / "analyze.html").read_text(encoding="utf-8")
    # Asked for or not: the same report.
    assert json.loads(run("analyze", program, tmp_path, "--json", "--force", "--synthetic").stdout) == json.loads(
        result.stdout
    )


def test_a_transformer_is_analysed_on_noise(tmp_path: Path) -> None:
    denoiser("sd3").save_pretrained(tmp_path / "sd3")
    program, out = tmp_path / "sd3.hqc", tmp_path / "out"
    out.mkdir()
    assert hqc("trace", tmp_path / "sd3", "--condition-length", "5", "-o", program).exit_code == 0
    refused = run("analyze", program, out)
    assert refused.exit_code == 2
    assert "was not traced from a pipeline, so hqc cannot sample it. Give --synthetic" in refused.stderr
    assert list(out.iterdir()) == []
    assert said(run("analyze", program, out, "--json", "--synthetic")) == NOISE
