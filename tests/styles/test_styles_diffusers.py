"""diffusers itself loads the same files, where PEFT is installed: the pipeline's denoiser and the program are equal."""

from pathlib import Path

import pytest
import torch
from denoisers import TOKENS
from lora_files import Layer, layers_of, save_lora, tensors
from text_pipelines import text_pipeline

from hqc.api import attach_loras, merge_loras
from hqc.capture import trace
from hqc.capture.diffusers_models import denoiser_source

pytest.importorskip("peft", reason="diffusers loads LoRAs by PEFT, which hqc does not need")


@pytest.mark.parametrize(
    ("kind", "naming"),
    [
        ("sd15", "diffusers"),
        ("sd15", "earlier diffusers"),
        ("sd15", "kohya"),
        ("sdxl", "kohya original"),
    ],
)
def test_load_lora_weights(tmp_path: Path, kind: str, naming: str) -> None:
    pipe = text_pipeline(kind, tmp_path)
    program = trace(denoiser_source(pipe.unet, kind, TOKENS))
    layers = layers_of(program)
    if "kohya" in naming:  # with one alpha: PEFT takes no notice of others that diffusers hands it
        layers = {name: Layer(one.down, one.up, 1.5) for name, one in layers.items()}
    if naming != "diffusers":  # what its converter of other names knows
        layers = {name: one for name, one in layers.items() if any(part in name for part in ("attn", ".ff."))}
    file = save_lora(tmp_path / "a.safetensors", tensors(layers, naming))
    pipe.load_lora_weights(str(file), adapter_name="a")
    pipe.set_adapters(["a"], [0.7])
    sample, timestep, *conditions = program.example_inputs(2)
    added = dict(zip(("text_embeds", "time_ids"), conditions[1:], strict=True)) if conditions[1:] else None
    call = {"encoder_hidden_states": conditions[0], "added_cond_kwargs": added, "return_dict": False}
    with torch.no_grad():
        wanted = pipe.unet(sample, timestep, **call)[0]
    for found in (
        merge_loras(program, [f"{file}:0.7"]).module()(sample, timestep, *conditions),
        attach_loras(program, [str(file)]).module()(sample, timestep, *conditions, torch.full((2,), 0.7)),
    ):
        assert float((found - wanted).norm() / wanted.norm()) <= 3e-6
