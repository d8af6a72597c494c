"""diffusers itself loads the same files, where PEFT is installed: the pipeline's denoiser and the program are equal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import TOKENS
from lora_files import Layer, layers_of, save_lora, tensors
from text_pipelines import text_pipeline
from torch import Tensor

from hqc.api import attach_loras, merge_loras, ptq
from hqc.capture import trace
from hqc.capture.diffusers_models import denoiser_source
from hqc.program import Program

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


def test_load_lora_weights_around_quantised_layers(tmp_path: Path) -> None:
    """PEFT's branches read what a layer is given, before it is rounded, and add to what the rounded layer gives."""
    pipe = text_pipeline("sd15", tmp_path)
    program = trace(denoiser_source(pipe.unet, "sd15", TOKENS))
    file = save_lora(tmp_path / "a.safetensors", tensors(layers_of(program), "diffusers"))
    sample, _, *conditions = program.example_inputs(2)
    timestep = torch.full((2,), 500.0)
    quantised = ptq(program, "rtn", "w8a8", forward_loop=lambda unet: unet.session(sample, timestep, *conditions))
    styled = attach_loras(quantised, [str(file)]).module()
    pipe.load_lora_weights(str(file), adapter_name="a")
    for plan in quantised.plan.sites:
        _round(pipe.unet, quantised, plan)

    def of_theirs(output: Tensor) -> float:
        with torch.no_grad():
            wanted = pipe.unet(sample, timestep, encoder_hidden_states=conditions[0], return_dict=False)[0]
        return float((output - wanted).norm() / wanted.norm())

    pipe.set_adapters(["a"], [0.0])
    rounding = of_theirs(program.module()(sample, timestep, *conditions))
    for scale in (0.0, 0.7, 1.3):
        pipe.set_adapters(["a"], [scale])
        # 3e-7; sums in another order may move a value to the next code: the bound is the project's for that.
        assert of_theirs(styled(sample, timestep, *conditions, torch.full((2,), scale))) <= 0.1 * rounding
        assert of_theirs(quantised.module()(sample, timestep, *conditions)) > 10 * rounding or scale == 0.0


def _round(unet: Any, program: Program, plan: Any) -> None:
    """Rounds the weights of a layer, and what it is given, by a program's scales; in plain torch."""
    layer = unet.get_submodule(plan.site)
    layer = getattr(layer, "base_layer", layer)
    most, least = 2 ** (plan.activation_bits - 1) - 1, -(2 ** (plan.weight_bits - 1))
    (step,) = program.state[f"{plan.site}.activation_scale_table"]
    layer.register_forward_pre_hook(lambda _, given: (torch.clamp(torch.round(given[0] / step), -most, most) * step,))
    steps = program.state[f"{plan.site}.weight_scale"].reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.data = torch.clamp(torch.round(layer.weight.data / steps), least, -least - 1) * steps
