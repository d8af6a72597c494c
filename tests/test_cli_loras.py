"""LoRAs on the command line: merged while tracing, attached to programs and exports, scaled while sampling."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lora_files import layers_of, merged_by_hand, save_lora, tensors
from test_cli import hqc, ok, refused
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.storage import load_program, save_program


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    work = tmp_path_factory.mktemp("loras")
    source, program = saved_pipeline("classes"), traced_pipeline("classes")
    save_program(program, work / "captured.hqc", pipeline=source)
    ok("ptq", work / "captured.hqc", "-o", work / "quantised.hqc", "--n-steps", 2, "--calib-size", 1)
    layers = layers_of(program)
    dropped = {name for name in layers if name.endswith(("attn2.to_q", "attn2.to_k"))}  # of one key: no effect
    held = tensors({name: layer for name, layer in layers.items() if name not in dropped}, "kohya")
    whole = save_lora(work / "whole.safetensors", tensors(layers, "kohya"))
    lora = save_lora(work / "pixel-art.safetensors", held)
    with_text = save_lora(work / "text.safetensors", {**held, "lora_te_x.alpha": torch.tensor(1.0)})
    return SimpleNamespace(
        work=work,
        source=source,
        program=program,
        captured=work / "captured.hqc",
        lora=lora,
        text=with_text,
        whole=whole,
    )


def test_trace_merges_and_says_so(made: SimpleNamespace, tmp_path: Path) -> None:
    wanted = merged_by_hand(made.program, layers_of(made.program), 0.8)
    lora = f"pixel_art={made.whole}:0.8"
    said = json.loads(ok("trace", made.source, "-o", tmp_path / "a.hqc", "--lora", lora, "--json").stdout)
    count = len(layers_of(made.program))
    assert said["loras"] == f"pixel_art (whole.safetensors): merged at 0.8; rank 3 at {count} sites"
    program = load_program(tmp_path / "a.hqc")
    for name, tensor in wanted.state.items():
        torch.testing.assert_close(program.state[name], tensor)
    for command in (("explain", tmp_path / "a.hqc"), ("inspect", tmp_path / "a.hqc", "--no-graph")):
        assert "merged at 0.8" in ok(*command).stdout
    result = hqc("trace", made.source, "-o", tmp_path / "b.hqc", "--lora", made.text)
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "left out of the LoRA: text encoder: 1 tensors of text.safetensors; a program is the denoiser alone"
    ]


def test_attach_export_and_sample(made: SimpleNamespace, tmp_path: Path) -> None:
    quantised, styled = made.work / "quantised.hqc", tmp_path / "styled.hqc"
    assert (
        "input lora_scale_p, 0.5 unless given"
        in ok("attach-lora", quantised, "-o", styled, "--lora", f"p={made.lora}:0.5").stdout
    )
    said = ok("export", quantised, "-o", tmp_path / "onnx", "--lora", f"p={made.lora}:0.5", "--against", made.captured)
    assert "input lora_scale_p, 0.5 unless given" in said.stdout
    assert "input lora_scale_p, 0.5 unless given" in ok("explain", styled).stdout
    ok("export", styled, "-o", tmp_path / "onnx2")  # what is attached is exported
    result = hqc("attach-lora", quantised, "-o", tmp_path / "whole.hqc", "--lora", made.whole)
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("left out of the LoRA: down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k, ")
    assert line.endswith(" more): the program has dropped the layer, which had no effect")
    sampling = ("--labels", "1", "--per-class", 1, "--n-steps", 2, "--guidance-scale", 1)
    for number, (model, scale) in enumerate(
        [(quantised, None), (styled, "0"), (styled, None), (styled, "0.5"), (tmp_path / "onnx", "0.5")]
    ):
        more = () if scale is None else ("--lora-scale", f"p={scale}")
        ok("sample", model, "-o", tmp_path / f"{number}.png", *sampling, *more)
    plain, off, usual, given, exported = ((tmp_path / f"{n}.png").read_bytes() for n in range(5))
    assert usual == given
    assert usual != off
    assert exported
    assert _grid(plain) == _grid(off)


def _grid(png: bytes) -> bytes:
    """The images without the line that names the model."""
    import io

    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    return pixels[pixels.shape[0] // 2 :].tobytes()


def test_merge_at_export_is_for_captured_programs(made: SimpleNamespace, tmp_path: Path) -> None:
    quantised = made.work / "quantised.hqc"
    line = refused(tmp_path, "export", quantised, "-o", tmp_path / "x", "--lora", made.lora, "--merge-lora")
    assert line.startswith("--merge-lora: is possible before quantisation alone, and the program is quantised.")
    ok("export", made.captured, "-o", tmp_path / "x", "--target", "portable", "--lora", made.lora, "--merge-lora")
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert [style["merged"] for style in manifest["loras"]] == [True]
    assert [spec["name"] for spec in manifest["inputs"]] == ["sample", "timestep", "condition"]


def test_lines_of_refusal(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    lora, out = made.lora, tmp_path / "x"
    for arguments, said in (
        (("trace", made.source, "-o", out, "--lora", f"{lora}:much"), "has the scale 'much', which is no number."),
        (("trace", made.source, "-o", out, "--lora", f"{lora}:nan"), "has the scale nan; expected a finite number."),
        (("trace", made.source, "-o", out, "--lora", lora, "--lora", lora), "--lora: two are called pixel_art."),
        (("trace", made.source, "-o", out, "--lora", tmp_path / "a.bin"), "may be a pickle"),
        (("trace", made.source, "-o", out, "--lora", "none.safetensors"), "none.safetensors: no such file."),
        (("attach-lora", made.captured, "-o", out), "--lora: is missing"),
        (("export", made.captured, "-o", out, "--target", "tensorrt", "--lora", lora), "has no inputs for LoRAs"),
        (("sample", made.captured, "-o", out, "--lora-scale", "p=1"), "LoRA p: is not attached, and none is."),
        (("sample", made.captured, "-o", out, "--lora-scale", "p"), "--lora-scale p: is no NAME=SCALE."),
        (("sample", made.captured, "-o", out, "--lora-scale", "p=x"), "has the scale 'x', which is no number."),
    ):
        line = refused(tmp_path, *arguments)
        assert said in line
        assert len(line) <= 300
