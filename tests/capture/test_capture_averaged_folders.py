"""Folders with raw and averaged weights: the averaged ones are read and named, or the raw ones, if asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from denoisers import denoiser
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from huggingface_hub import constants

from hqc.capture import find_source
from hqc.capture.hub import fetch_snapshot
from hqc.cli import main
from hqc.errors import CaptureError


def unet(mark: float) -> Any:
    """A UNet whose last bias is `mark`."""
    model = denoiser("labelled")
    with torch.no_grad():
        model.conv_out.bias.fill_(mark)
    return model


RAW, AVERAGED = 1.0, 2.0


def mark(path: Path, **options: Any) -> tuple[float, str | None]:
    """Which weights were taken, and what was said."""
    source = find_source(str(path), **options)
    return float(source.module.unet.conv_out.bias.detach()[0]), source.notes.get("weights")


def _training(folder: Path) -> None:
    """As diffusers' scripts write a checkpoint of training: the model, and its average by their own class."""
    unet(RAW).save_pretrained(folder / "unet")
    averaged = unet(AVERAGED)
    EMAModel(averaged.parameters(), model_cls=UNet2DModel, model_config=averaged.config).save_pretrained(
        str(folder / "unet_ema")
    )
    (folder / "optimizer.bin").write_bytes(b"pickled")


def _pipeline(folder: Path) -> None:
    DDPMPipeline(unet(RAW), DDPMScheduler()).save_pretrained(folder)
    unet(AVERAGED).save_pretrained(folder / "unet_ema")


def _non_ema(folder: Path) -> None:
    unet(AVERAGED).save_pretrained(folder)
    unet(RAW).save_pretrained(folder, variant="non_ema")


def _named_ema(folder: Path) -> None:
    unet(RAW).save_pretrained(folder)
    unet(AVERAGED).save_pretrained(folder, variant="ema")


def _both_named(folder: Path) -> None:
    unet(RAW).save_pretrained(folder, variant="non_ema")
    unet(AVERAGED).save_pretrained(folder, variant="ema")


def _inside(folder: Path) -> None:
    """Two variants in the denoiser's folder of a pipeline."""
    DDPMPipeline(unet(AVERAGED), DDPMScheduler()).save_pretrained(folder)
    unet(RAW).save_pretrained(folder / "unet", variant="non_ema")


STEM = "diffusion_pytorch_model"
LAYOUTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a checkpoint of training": (_training, "unet", "unet_ema"),
    "a pipeline": (_pipeline, "unet", "unet_ema"),
    "the raw ones have a name": (_non_ema, f"{STEM}.non_ema", STEM),
    "the averaged ones have a name": (_named_ema, STEM, f"{STEM}.ema"),
    "both have a name": (_both_named, f"{STEM}.non_ema", f"{STEM}.ema"),
    "a pipeline's denoiser": (_inside, f"{STEM}.non_ema", STEM),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_or_averaged(layout: str, tmp_path: Path) -> None:
    write, raw, averaged = LAYOUTS[layout]
    write(tmp_path)
    assert mark(tmp_path) == mark(tmp_path, weights="ema") == (AVERAGED, averaged)
    assert mark(tmp_path, weights="raw") == (RAW, raw)


@pytest.mark.parametrize("layout", ["a checkpoint of training", "a pipeline"])
def test_the_pipeline_around(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout][0](tmp_path)
    assert find_source(str(tmp_path)).pipeline == (tmp_path if layout == "a pipeline" else None)


def test_the_average_alone(tmp_path: Path) -> None:
    unet(AVERAGED).save_pretrained(tmp_path / "unet_ema")
    assert mark(tmp_path) == mark(tmp_path, weights="ema") == (AVERAGED, "unet_ema")
    with pytest.raises(CaptureError, match=r"has averaged weights alone \(unet_ema\)\. Leave --weights raw out"):
        find_source(str(tmp_path), weights="raw")


def test_one_set_is_no_choice(tmp_path: Path) -> None:
    unet(RAW).save_pretrained(tmp_path)
    assert mark(tmp_path) == (RAW, None)
    with pytest.raises(CaptureError, match=r"has one set of weights, not raw and averaged ones\. Leave --weights ema"):
        find_source(str(tmp_path), weights="ema")
    with pytest.raises(CaptureError, match="takes no --weights"):
        find_source("digits", weights="ema")


def test_a_variant_is_asked_for_by_itself(tmp_path: Path) -> None:
    _non_ema(tmp_path)
    assert mark(tmp_path, variant="non_ema") == (RAW, None)
    with pytest.raises(CaptureError, match="--weights: and --variant non_ema exclude each other"):
        find_source(str(tmp_path), weights="raw", variant="non_ema")


def test_a_variant_of_the_average(tmp_path: Path) -> None:
    unet(RAW).save_pretrained(tmp_path / "unet", variant="fp16")
    unet(AVERAGED).save_pretrained(tmp_path / "unet_ema", variant="fp16")
    assert mark(tmp_path, variant="fp16") == mark(tmp_path) == (AVERAGED, "unet_ema")


def test_trace_says_which(tmp_path: Path) -> None:
    _training(tmp_path / "checkpoint-500")
    said = CliRunner().invoke(main, ["trace", str(tmp_path / "checkpoint-500"), "-o", str(tmp_path / "x"), "--json"])
    assert (said.exit_code, said.stderr) == (0, "")
    assert json.loads(said.stdout)["weights"] == "unet_ema"


@pytest.mark.parametrize(("wanted", "found"), [(None, AVERAGED), ("ema", AVERAGED), ("raw", RAW)])
def test_a_hub_id(wanted: Any, found: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--tiny--both"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    _non_ema(repository / "snapshots" / ("a" * 40))
    source = find_source("tiny/both", weights=wanted)
    assert float(source.module.unet.conv_out.bias.detach()[0]) == found
    assert source.notes["weights"] == (f"{STEM}.non_ema" if wanted == "raw" else STEM)


@pytest.mark.parametrize(("variant", "fetched"), [(None, set()), ("non_ema", {"*non_ema*"}), ("fp16", {"*.fp16*"})])
def test_what_is_fetched_of_a_hub_id(
    variant: str | None, fetched: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The averaged weights beside the denoiser's are, and the raw ones only where they are asked for."""
    import huggingface_hub

    asked: dict[str, Any] = {}
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    unet(RAW).save_pretrained(tmp_path / "unet")

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "model_index.json"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    fetch_snapshot("tiny/pipe", None, variant)
    assert {"unet/*.safetensors", "unet_ema/*.safetensors"} <= set(asked["allow_patterns"])
    left_out = {"*.fp16*", "*.bf16*", "*non_ema*"}
    assert set(asked["ignore_patterns"]) & left_out == left_out - fetched
