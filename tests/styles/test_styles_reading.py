"""LoRA files: every naming means the same weights, diffusers' own converters agree, and what is wrong is said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from denoisers import captured_denoiser, denoiser
from lora_files import NAMINGS, Layer, layers_of, merged_by_hand, save_lora, tensors
from safetensors.torch import save_file

from hqc.api import attach_loras, merge_loras
from hqc.errors import ArtefactError
from hqc.program import Program
from hqc.styles.keys import layer_of, layers_by_name, split_key
from hqc.styles.reading import read_lora

Captured = Callable[[str], Program]


def equal(found: Program, wanted: Program) -> None:
    assert found.state.keys() == wanted.state.keys()
    for name, tensor in wanted.state.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=1e-6, atol=1e-7)


def refused(path: Path, program: Program) -> str:
    with pytest.raises(ArtefactError) as error:
        merge_loras(program, [str(path)])
    assert len(error.value.line) <= 900
    return error.value.line


@pytest.mark.parametrize("alphas", [False, True])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_means_the_same_weights(tmp_path: Path, naming: str, alphas: bool) -> None:
    program = captured_denoiser("sdxl")
    layers = layers_of(program, alphas=alphas)
    file = save_lora(tmp_path / "a.safetensors", tensors(layers, naming))
    merged = merge_loras(program, [f"{file}:0.8"])
    equal(merged, merged_by_hand(program, layers, 0.8))
    assert set(merged.history[-1].touched) == layers.keys()
    (style,) = merged.styles
    assert (style.name, style.scale, style.rank, style.sites, style.merged) == ("a", 0.8, 3, len(layers), True)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_diffusers_converter_of_kohya_names_agrees(tmp_path: Path, kind: str) -> None:
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    program = captured_denoiser(kind)
    # diffusers' converter knows the layers of attention, of res blocks, and those that resample.
    layers = {
        name: layer
        for name, layer in layers_of(program, alphas=True).items()
        if any(part in name for part in ("attn", ".ff.", "resnets", "samplers", "proj_"))
    }
    held = tensors(layers, "kohya")
    original = tensors(layers, "kohya original")
    given = _maybe_map_sgm_blocks_to_diffusers(dict(original), denoiser(kind).config) if kind == "sdxl" else held
    found, alphas = _convert_non_diffusers_lora_to_diffusers(dict(given))
    ours = layers_by_name((site for site, _ in program.sites()), program.origin.unet_config)
    for key in found:
        name, _ = split_key(key)
        assert layer_of(name, ours) in layers, key
    # Its alphas are keyed by the tensor that they belong to.
    own = {(split_key(key.removesuffix(".alpha")) or split_key(key))[0]: value for key, value in alphas.items()}
    found |= {f"{name}.alpha": torch.tensor(value) for name, value in own.items()}
    theirs = save_lora(tmp_path / "theirs.safetensors", found)
    wanted = merged_by_hand(program, layers, 1.0)
    equal(merge_loras(program, [str(theirs)]), wanted)
    for name, given in (("kohya", held), ("original", original)):
        equal(merge_loras(program, [str(save_lora(tmp_path / f"{name}.safetensors", given))]), wanted)


def test_the_first_naming_of_attention_processors(tmp_path: Path) -> None:
    program = captured_denoiser("sd15")
    own = {name: layer for name, layer in layers_of(program).items() if ".to_" in name}
    held = {}
    for name, layer in own.items():
        attention, _, to = name.removesuffix(".0").rpartition(".")
        held[f"unet.{attention}.processor.{to}_lora.down.weight"] = layer.down
        held[f"unet.{attention}.processor.{to}_lora.up.weight"] = layer.up
    merged = merge_loras(program, [str(save_lora(tmp_path / "a.safetensors", held))])
    equal(merged, merged_by_hand(program, own, 1.0))


def test_a_transformers_layers_and_half_precision(tmp_path: Path) -> None:
    program = captured_denoiser("sd3")
    layers = {n: Layer(one.down.bfloat16(), one.up.half()) for n, one in layers_of(program).items()}
    held = {f"transformer.{k.removeprefix('unet.')}": v for k, v in tensors(layers, "diffusers").items()}
    merged = merge_loras(program, [str(save_lora(tmp_path / "a.safetensors", held))])
    wide = {name: Layer(one.down.float(), one.up.float()) for name, one in layers.items()}
    equal(merged, merged_by_hand(program, wide, 1.0))


def test_locon_with_a_middle_and_linear_matrices_at_1x1(captured: Captured, tmp_path: Path) -> None:
    program = captured("two_sites")
    generator = torch.Generator().manual_seed(1)
    down, mid, up = (torch.randn(s, generator=generator) for s in ((2, 32, 1, 1), (2, 2, 3, 3), (16, 2, 1, 1)))
    held = {f"lora_unet_conv.lora_{n}.weight": t for n, t in (("down", down), ("mid", mid), ("up", up))}
    merged = merge_loras(program, [str(save_lora(tmp_path / "a.safetensors", held))])
    delta = torch.einsum("or,rshw,sc->ochw", up.flatten(1), mid, down.flatten(1))
    torch.testing.assert_close(merged.state["conv.weight"], program.state["conv.weight"] + delta)
    program = captured_denoiser("sd15")
    name = "down_blocks.1.attentions.0.proj_in"
    held = {f"unet.{name}.lora_A.weight": torch.ones(1, 32), f"unet.{name}.lora_B.weight": torch.ones(32, 1)}
    merged = merge_loras(program, [str(save_lora(tmp_path / "b.safetensors", held))])
    torch.testing.assert_close(merged.state[f"{name}.weight"], program.state[f"{name}.weight"] + 1)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("rooted", [False, True])
def test_alpha_of_settings(captured: Captured, tmp_path: Path, beside: bool, rooted: bool) -> None:
    """diffusers keeps it in the file, PEFT in a file beside it; a pattern says more than the common one."""
    program = captured("two_sites")
    layers = layers_of(program)
    settings = {"r": 2, "lora_alpha": 3, "alpha_pattern": {"head": 5}, "use_rslora": rooted, "use_dora": False}
    file, metadata = tmp_path / "adapter_model.safetensors", None
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()})}
    save_lora(file, tensors(layers, "peft"), metadata)
    ranks = {name: len(layer.down) for name, layer in layers.items()}
    alphas = {name: alpha * (ranks[name] ** 0.5 if rooted else 1) for name, alpha in (("conv", 3.0), ("head", 5.0))}
    own = {name: Layer(one.down, one.up, alphas[name]) for name, one in layers.items()}
    equal(merge_loras(program, [str(file)]), merged_by_hand(program, own, 1.0))


def test_settings_that_ask_for_more_are_refused(captured: Captured, tmp_path: Path) -> None:
    held = tensors(layers_of(captured("two_sites")), "peft")
    for settings, said in (
        ({"use_dora": True}, "is a DoRA"),
        ({"lora_alpha": "much"}, "whose alpha is no number"),
        ({"lora_alpha": 10**400}, "whose alpha is no number"),
        ({"alpha_pattern": {"conv": float("nan")}}, "whose alpha is no number"),
        ({"alpha_pattern": [1]}, "whose alpha is no number"),
    ):
        metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": 1, **settings})}
        file = save_lora(tmp_path / "a.safetensors", held, metadata)
        assert said in refused(file, captured("two_sites"))
    for text in ("{", "[]", "[" * 100_000, " " * (2**20 + 1)):
        file = save_lora(tmp_path / "a.safetensors", held, {"lora_adapter_metadata": text})
        assert "has settings that cannot be read" in refused(file, captured("two_sites"))


def test_text_encoders_are_left_out_and_said(captured: Captured, tmp_path: Path) -> None:
    program = captured("two_sites")
    layers = layers_of(program)
    text = {
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(1, 8),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_B.weight": torch.ones(8, 1),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
    }
    file = save_lora(tmp_path / "a.safetensors", {**tensors(layers, "diffusers"), **text})
    for change in (merge_loras, attach_loras):
        result = change(program, [str(file)])
        said = "3 tensors of a.safetensors; a program is the denoiser alone"
        assert result.history[-1].missed == (("text encoder", said),)
    equal(merge_loras(program, [str(file)]), merged_by_hand(program, layers, 1.0))
    only = save_lora(tmp_path / "b.safetensors", text)
    assert "3 tensors of text encoders and nothing that changes the denoiser" in refused(only, program)


def _wrong(held: dict[str, torch.Tensor]) -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """Files that are refused, and what is said of each."""
    down, up = "unet.conv.lora_A.weight", "unet.conv.lora_B.weight"
    nan = held[down].clone()
    nan[0, 3] = float("nan")
    wide = torch.zeros(17, 32, 3, 3), torch.zeros(16, 17, 1, 1)
    many = {f"unet.other.{i}.lora_A.weight": torch.ones(1) for i in range(5)}
    return {
        "nan": ({**held, down: nan}, "numbers that are NaN or infinite in unet.conv.lora_A.weight"),
        "infinite": ({**held, up: held[up] / 0}, "numbers that are NaN or infinite in unet.conv.lora_B.weight"),
        "overflow": ({**held, "unet.conv.alpha": torch.tensor(3e38), up: held[up] * 1e9}, "overflows float32 at conv"),
        "channels": ({**held, down: torch.ones(2, 8, 3, 3)}, "conv has the shapes [2, 8, 3, 3] and [16, 2, 1, 1]"),
        "kernel": ({**held, down: torch.ones(2, 32, 1, 1)}, "its weight is [16, 32, 3, 3]"),
        "outputs": ({**held, up: torch.ones(9, 2, 1, 1)}, "and [9, 2, 1, 1]"),
        "ranks": ({**held, up: torch.ones(16, 3, 1, 1)}, "and [16, 3, 1, 1]"),
        "rank": ({**held, down: wide[0], up: wide[1]}, "conv has rank 17; its weight [16, 32, 3, 3] has at most 16"),
        "empty rank": ({**held, down: torch.ones(0, 32, 3, 3), up: torch.ones(16, 0, 1, 1)}, "[16, 0, 1, 1]"),
        "alpha": ({**held, "unet.conv.alpha": torch.ones(2)}, "conv has an alpha of [2]; expected one number"),
        "mid": ({**held, "unet.conv.lora_mid.weight": torch.ones(3, 3, 3, 3)}, "[3, 3, 3, 3]"),
        "unknown": ({**held, **many}, "5 of 9 tensors that are no LoRA of a layer here: unet.other.0.lora_A.weight"),
        "another kind": ({**held, "lora_unet_conv.hada_w1_a": torch.ones(1)}, "lora_unet_conv.hada_w1_a"),
        "dora": ({**held, "unet.conv.lora_magnitude_vector": torch.ones(16)}, "unet.conv.lora_magnitude_vector"),
        "bias": ({**held, "unet.conv.lora_B.bias": torch.ones(16)}, "unet.conv.lora_B.bias"),
        "half": ({down: held[down]}, "holds one matrix of two, of conv"),
        "twice": ({**held, "conv.lora_down.weight": held[down].clone()}, "a part of one layer twice"),
        "type": ({**held, down: held[down].to(torch.int8)}, "as I8; expected F64, F32, F16, BF16"),
        "nothing": ({}, "nothing that changes the denoiser"),
        "key": ({**held, "\x1b[31m" + "k" * 5000: torch.ones(1)}, "\ufffd[31mkkk"),
    }


@pytest.mark.parametrize(
    "case", list(_wrong({k: torch.ones(1, 9) for k in ("unet.conv.lora_A.weight", "unet.conv.lora_B.weight")}))
)
def test_hostile_files(captured: Captured, tmp_path: Path, case: str) -> None:
    program = captured("two_sites")
    held, said = _wrong(tensors(layers_of(program), "diffusers"))[case]
    file = save_lora(tmp_path / "a.safetensors", held)
    for change in (merge_loras, attach_loras):
        with pytest.raises(ArtefactError) as error:
            change(program, [str(file)])
        line = error.value.line
        assert said in line
        assert line.isprintable()
        assert len(line) <= 900


def test_files_that_are_none(captured: Captured, tmp_path: Path) -> None:
    program = captured("two_sites")
    for ending in (".pt", ".bin", ".ckpt", ".pth"):
        pickled = tmp_path / f"a{ending}"
        torch.save({}, pickled)
        line = refused(pickled, program)
        assert "may be a pickle, which can run code" in line
        assert "safetensors.torch.save_file" in line
    assert "no such file" in refused(tmp_path / "none.safetensors", program)
    assert "is a folder" in refused(tmp_path, program)
    for content in (b"", b"\x10", b"\xff" * 100, (2**40).to_bytes(8, "little") + b"{}"):
        (tmp_path / "b.safetensors").write_bytes(content)
        assert "is no safetensors file" in refused(tmp_path / "b.safetensors", program)


def test_a_merge_that_overflows_is_refused(captured: Captured, tmp_path: Path) -> None:
    program = captured("two_sites")
    file = save_lora(tmp_path / "a.safetensors", tensors(layers_of(program), "diffusers"))
    with pytest.raises(ArtefactError, match=r"makes weights of (conv|head) infinite at scale 1e\+39"):
        merge_loras(program, [f"{file}:1e39"])


def test_shapes_are_checked_before_a_tensor_is_read(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of any size costs what its header does."""
    import hqc.styles.reading as reading

    file = tmp_path / "a.safetensors"
    save_file({"unet.conv.lora_A.weight": torch.ones(2, 9), "unet.conv.lora_B.weight": torch.ones(9, 2)}, file)
    monkeypatch.setattr(reading.LoraFile, "_tensor", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(ArtefactError, match="conv has the shapes"):
        read_lora(file, captured("two_sites"))
    monkeypatch.setattr(reading, "_LARGEST_FILE", 10)
    with pytest.raises(ArtefactError, match="GiB; a LoRA has at most"):
        read_lora(file, captured("two_sites"))
    monkeypatch.undo()
    monkeypatch.setattr(reading, "_MOST_KEYS", 1)
    with pytest.raises(ArtefactError, match="holds 2 tensors; expected at most 1"):
        read_lora(file, captured("two_sites"))


def test_a_weight_of_several_calls_is_changed_once(captured: Captured, tmp_path: Path) -> None:
    program = captured("shared_weights")
    layers = layers_of(program)
    file = save_lora(tmp_path / "a.safetensors", tensors(layers, "bare"))
    equal(merge_loras(program, [str(file)]), merged_by_hand(program, layers, 1.0))


def test_two_files_are_added(captured: Captured, tmp_path: Path) -> None:
    program = captured("two_sites")
    found, texts = program, []
    for number, scale in ((1, 0.5), (2, -1.25)):
        layers = layers_of(program, seed=number)
        texts.append(f"s{number}={save_lora(tmp_path / f'{number}.safetensors', tensors(layers, 'bare'))}:{scale}")
        found = merged_by_hand(found, layers, scale)
    merged = merge_loras(program, texts)
    equal(merged, found)
    assert [style.name for style in merged.styles] == ["s1", "s2"]
