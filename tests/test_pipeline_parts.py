"""Which files a pipeline consists of: what its index names, with the weights that are used, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline

from hqc.errors import ArtefactError
from hqc.models import digits_path
from hqc.pipeline_parts import part_variant, pipeline_files, pipeline_variant, read_index

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.38.0",
    "requires_safety_checker": True,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
USUAL = (
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
ELSE = (
    ".git/config",
    ".gitattributes",
    "README.md",
    "logs/run.txt",
    "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt",
    "pipeline.py",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.onnx",
    "text_encoder/flax_model.msgpack",
    "text_encoder/.config.json.swp",
    "tokenizer/.cache/x.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.non_ema.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "vae/module.py",
    "vae/ema.safetensors",
)


def write(folder: Path, *names: str, index: dict[str, Any] = INDEX) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_what_the_index_names_with_its_weights(tmp_path: Path) -> None:
    found = pipeline_files(write(tmp_path, *USUAL, *ELSE))
    assert sorted(found) == sorted(("model_index.json", *USUAL))
    assert all(path == tmp_path / name for name, path in found.items())


def test_the_variant_that_was_loaded_gets_plain_names(tmp_path: Path) -> None:
    found = pipeline_files(write(tmp_path, *USUAL, *ELSE), "fp16")
    assert sorted(found) == sorted(("model_index.json", *USUAL))
    assert found["vae/diffusion_pytorch_model.safetensors"].name == "diffusion_pytorch_model.fp16.safetensors"
    assert found["text_encoder/model.safetensors"].name == "model.fp16.safetensors"
    # A part that does not have it keeps its plain weights.
    (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    found = pipeline_files(tmp_path, "fp16")
    assert found["vae/diffusion_pytorch_model.safetensors"].name == "diffusion_pytorch_model.safetensors"


def test_the_only_variant_is_taken(tmp_path: Path) -> None:
    write(tmp_path, "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors")
    found = pipeline_files(tmp_path)
    assert found["vae/diffusion_pytorch_model.safetensors"].name == "diffusion_pytorch_model.fp16.safetensors"
    assert part_variant(tmp_path / "vae") == "fp16"
    assert part_variant(tmp_path / "text_encoder") is None
    assert part_variant(tmp_path / "nowhere") is None
    assert pipeline_variant(tmp_path, read_index(tmp_path)) == "fp16"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(variant: str | None, tmp_path: Path) -> None:
    ending = f".{variant}" if variant else ""
    shards = [f"model{ending}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    write(tmp_path, *(f"text_encoder/{name}" for name in (*shards, "model-00003-of-00009.safetensors")))
    index = {"weight_map": {"a": shards[1], "b": shards[0], "c": shards[0]}}
    (tmp_path / "text_encoder" / f"model.safetensors.index{ending}.json").write_text(json.dumps(index))
    assert sorted(pipeline_files(tmp_path, variant)) == [
        "model_index.json",
        *(f"text_encoder/{name}" for name in shards),
        "text_encoder/model.safetensors.index.json",
    ]


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "config.json", "a/b.safetensors", 3])
def test_lists_of_weights_that_name_something_else_are_refused(name: object, tmp_path: Path) -> None:
    write(tmp_path, "vae/config.json")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ArtefactError, match="is no list of weights"):
        pipeline_files(tmp_path)


@pytest.mark.parametrize("part", ["../secret", "/etc", ".git", "a/b", ""])
def test_parts_that_are_no_folders_of_the_pipeline_are_left_out(part: str, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    folder = tmp_path / "sd"
    folder.mkdir()
    write(folder, index={**INDEX, part: ["diffusers", "AutoencoderKL"]})
    assert list(pipeline_files(folder)) == ["model_index.json"]


def test_the_bundled_model_and_one_that_diffusers_has_saved(tmp_path: Path) -> None:
    names = [
        "class_embedder/config.json",
        "class_embedder/diffusion_pytorch_model.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert sorted(pipeline_files(digits_path())) == names
    assert sorted(pipeline_files(tiny_pipeline.save_tiny_pipeline(tmp_path / "tiny"))) == names
