"""The folders that `hqc export --pipeline` writes, as optimum reads them."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from hqc.lite import LitePipeline
from hqc.manifests import PIPELINE_KIND, check_manifest
from hqc.runtimes import load

PARTS = {
    "classes": {"class_embedder", "scheduler", "unet", "vae_decoder"},
    "prompts": {"scheduler", "text_encoder", "tokenizer", "unet", "vae_decoder"},
    "nothing": {"scheduler", "unet", "vae_decoder"},
}


def ports(folder: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


@pytest.mark.parametrize("kind", PARTS)
def test_every_file_is_in_the_manifest(kind: str, folders: dict[str, tuple[Path, Path]]) -> None:
    source, folder = folders[kind]
    manifest = check_manifest(folder, PIPELINE_KIND)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == there - {"manifest.json"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == PARTS[kind] == set(manifest["parts"])
    assert (folder / "model_index.json").read_bytes() == (source / "model_index.json").read_bytes()
    assert not [name for name in there if name.endswith((".safetensors", ".bin"))]


@pytest.mark.parametrize("kind", PARTS)
def test_every_model_has_a_configuration_and_optimums_names(kind: str, folders: dict[str, tuple[Path, Path]]) -> None:
    _, folder = folders[kind]
    models = {path.parent.name for path in folder.rglob("model.onnx")}
    assert all(json.loads((folder / name / "config.json").read_text(encoding="utf-8")) for name in models)
    condition = [] if kind == "nothing" else ["encoder_hidden_states"]
    assert ports(folder / "unet") == (["sample", "timestep", *condition], ["out_sample"])
    assert ports(folder / "vae_decoder") == (["latent_sample"], ["sample"])
    assert json.loads((folder / "vae_decoder" / "config.json").read_text(encoding="utf-8"))["scaling_factor"] > 0


def test_the_text_encoder_has_optimums_names(folders: dict[str, tuple[Path, Path]]) -> None:
    _, folder = folders["prompts"]
    assert ports(folder / "text_encoder") == (["input_ids"], ["last_hidden_state", "pooler_output"])
    assert {path.name for path in (folder / "tokenizer").iterdir()} >= {"tokenizer.json", "vocab.json", "merges.txt"}
    graph = onnx.load(str(folder / "text_encoder" / "model.onnx")).graph
    assert [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == ["N", 5]
    assert json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 3


def test_parts_are_exports_like_any_other(folders: dict[str, tuple[Path, Path]]) -> None:
    _, folder = folders["classes"]
    decoder, latents = load(folder / "vae_decoder"), np.zeros((1, 4, 4, 4), np.float32)
    pipe = LitePipeline(folder, threads=1)
    np.testing.assert_allclose(
        decoder.session(torch.from_numpy(latents)).numpy(), pipe._decoder(sample=latents), rtol=0, atol=1e-6
    )
    assert load(folder / "unet").runtime == "onnxruntime"


def test_a_copy_of_the_decoder_has_hqcs_names_again(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """`hqc compare` measures exports under hqc's own names; the decoder's output has the name of its input in hqc."""
    from hqc.export.interface import interface_of, rename_ports

    _, folder = folders["classes"]
    model = tmp_path / "model.onnx"
    model.write_bytes((folder / "vae_decoder" / "model.onnx").read_bytes())
    interface = interface_of(json.loads((folder / "vae_decoder" / "manifest.json").read_text()), folder)
    rename_ports(model, interface, back=True)
    assert ports(tmp_path) == (["sample"], ["output"])
    onnx.checker.check_model(str(model), full_check=True)
    rename_ports(model, interface)
    assert onnx.load(str(model)) == onnx.load(str(folder / "vae_decoder" / "model.onnx"))
