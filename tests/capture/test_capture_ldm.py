"""Original checkpoints: what is converted computes what the original modules compute, and runs the whole way."""

import gc
import json
from pathlib import Path
from typing import Any

import ldm_original as original
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from hqc.api import task_of
from hqc.capture import Source, find_source
from hqc.capture.ldm.config import LdmConfig
from hqc.capture.ldm.first_stage import build_vae
from hqc.capture.ldm.names import unet_name, vae_name
from hqc.capture.ldm.unet import build_unet
from hqc.cli import main
from hqc.models.ldm import ClassConditionalLDMPipeline, UnconditionalLDMPipeline
from hqc.runtimes import load
from hqc.storage import load_program, pipeline_folder

# Both sides compute in float32, in another order of sums and with another attention kernel: a few hundred roundings.
EQUAL = 5e-6


def save_ckpt(weights: original.Weights, path: Path) -> Path:
    torch.save({"epoch": 3, "global_step": 7, "state_dict": dict(weights)}, path)
    return path


def traced(config: dict[str, Any], weights: original.Weights, folder: Path, name: str = "model.ckpt") -> Source:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(dict(weights), path)
    else:
        save_ckpt(weights, path)
    return find_source(str(path), config=original.save_config(config, folder / "config.yaml"))


def averaged(weights: original.Weights) -> original.Weights:
    """The denoiser's weights replaced by their averages, as the original's `ema_scope` does."""
    swapped = original.Weights(weights)
    for name in weights:
        if name.startswith("model."):
            swapped[name] = weights["model_ema." + name.removeprefix("model.").replace(".", "")]
    swapped.frozen = True
    return swapped


def denoiser_inputs(config: dict[str, Any], weights: original.Weights) -> tuple[Tensor, ...]:
    p = config["model"]["params"]["unet_config"]["params"]
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(2, p["in_channels"], p["image_size"], p["image_size"], generator=generator)
    inputs = (sample, torch.tensor([3.0, 870.0]))
    if "cond_stage_model.embedding.weight" not in weights:
        return inputs
    return (*inputs, weights["cond_stage_model.embedding.weight"][[3, 7]][:, None])


@torch.no_grad()
def denoiser_error(source: Source, config: dict[str, Any], weights: original.Weights) -> float:
    """Relative difference between the source's module and the original modules over `weights`."""
    inputs = denoiser_inputs(config, weights)
    wanted = original.unet(weights, config["model"]["params"]["unet_config"]["params"], *inputs)
    assert wanted.std() > 0.1
    return float((source.module(*inputs) - wanted).norm() / wanted.norm())


VARIANTS = {
    "imagenet": original.tiny_config("imagenet"),
    "imagenet, head width": original.tiny_config("imagenet", num_heads=-1, num_head_channels=16),
    "imagenet, deep and shifted": original.tiny_config("imagenet", transformer_depth=2, use_scale_shift_norm=True),
    "imagenet, attention nowhere but in the middle": original.tiny_config("imagenet", attention_resolutions=[]),
    "bedroom": original.tiny_config("bedroom"),
    "bedroom, two layers": original.tiny_config("bedroom", num_res_blocks=2, attention_resolutions=[1]),
    "church": original.tiny_config("church"),
    "church, attention below": original.tiny_config("church", attention_resolutions=[4]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_denoiser_equals_the_original_modules(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    weights = original.make_checkpoint(config)
    source = traced(config, weights, tmp_path)
    assert denoiser_error(source, config, weights) < EQUAL
    assert source.notes["weights"] == "model"
    assert source.origin.source == str(tmp_path / "model.ckpt")


@pytest.mark.parametrize("kind", ["imagenet", "bedroom", "church"])
def test_averaged_weights_are_preferred(kind: str, tmp_path: Path) -> None:
    config = original.tiny_config(kind)
    weights = original.make_checkpoint(config, ema=True)
    source = traced(config, weights, tmp_path, "model.safetensors")
    assert source.notes["weights"] == "model_ema"
    assert denoiser_error(source, config, averaged(weights)) < EQUAL
    assert denoiser_error(source, config, weights) > 0.1
    raw = find_source(str(tmp_path / "model.safetensors"), config=tmp_path / "config.yaml", weights="raw")
    assert raw.notes["weights"] == "model"
    assert denoiser_error(raw, config, weights) < EQUAL


@pytest.mark.parametrize("encoder", ["FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder"])
def test_the_denoiser_of_a_model_with_a_text_encoder(encoder: str, tmp_path: Path) -> None:
    """Stable Diffusion 1 and 2: the text encoder's weights are of no use here, and of any name."""
    config = original.tiny_config("imagenet")
    weights = original.make_checkpoint(config, ema=True)
    average = averaged(weights)
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(7)[None]
    params = config["model"]["params"]
    params["cond_stage_config"] = {"target": f"ldm.modules.encoders.modules.{encoder}", "params": {"freeze": True}}
    params["parameterization"] = "v" if "Open" in encoder else "eps"
    source = traced(config, weights, tmp_path)
    width = params["unet_config"]["params"]["context_dim"]
    assert [spec.shape for spec in source.inputs][2] == ("N", 77, width)
    assert source.pipeline is None
    assert source.notes["weights"] == "model_ema"
    wanted = traced(original.tiny_config("imagenet"), average, tmp_path, "other.ckpt")
    for mine, other in zip(source.module.parameters(), wanted.module.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_averaged_weights_alone_are_enough(tmp_path: Path) -> None:
    config = original.tiny_config("bedroom")
    weights = original.make_checkpoint(config, ema=True)
    pruned = original.Weights({key: t for key, t in weights.items() if not key.startswith("model.")})
    assert denoiser_error(traced(config, pruned, tmp_path), config, averaged(weights)) < EQUAL


def test_half_precision_is_read_in_float32(tmp_path: Path) -> None:
    config = original.tiny_config("bedroom")
    weights = original.make_checkpoint(config)
    halves = original.Weights({key: tensor.half() for key, tensor in weights.items()})
    source = traced(config, halves, tmp_path)
    rounded = original.Weights({key: tensor.half().float() for key, tensor in weights.items()})
    assert denoiser_error(source, config, rounded) < EQUAL


# ---- the first stage -----------------------------------------------------------------------------------------------


def stage_variant(kind: str, **coder: Any) -> dict[str, Any]:
    config = original.tiny_config(kind)
    config["model"]["params"]["first_stage_config"]["params"]["ddconfig"].update(coder)
    return config


STAGES = {
    "VQ": (stage_variant("bedroom"), 1.0),
    "KL": (stage_variant("church"), 0.22),
    "VQ with attention": (stage_variant("bedroom", attn_resolutions=[8], num_res_blocks=2), 1.0),
    "KL, three levels": (stage_variant("church", ch_mult=[1, 2, 2], attn_resolutions=[16]), 0.22),
}


@torch.no_grad()
@pytest.mark.parametrize("name", STAGES)
def test_the_first_stage_equals_the_original_modules(name: str, tmp_path: Path) -> None:
    config, factor = STAGES[name]
    stage = config["model"]["params"]["first_stage_config"]
    weights = original.make_checkpoint(config)
    weights.frozen = True
    source = traced(config, weights, tmp_path)
    assert source.pipeline is not None
    pipeline = UnconditionalLDMPipeline.from_pretrained(source.pipeline, unet=None)
    assert pipeline.vae.config.scaling_factor == pytest.approx(factor)

    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, stage["params"]["embed_dim"], 8, 8, generator=generator)
    wanted = original.decode(weights, stage, latents / factor)
    found = pipeline._decoded(latents, "pt")  # what the pipeline makes of the sampler's latents
    assert float((found - (wanted / 2 + 0.5).clamp(0, 1)).abs().max()) < 1e-4  # pixels in [0, 1], sums of 600 terms
    assert found.std() > 0.05

    side = stage["params"]["ddconfig"]["resolution"]
    images = torch.randn(1, 3, side, side, generator=generator)
    encoded = pipeline.vae.encode(images, return_dict=False)[0]
    encoded = encoded.parameters if stage["params"]["ddconfig"]["double_z"] else encoded
    expected = original.encode(weights, stage, images)
    assert float((encoded - expected).norm() / expected.norm()) < EQUAL


def test_vq_decoding_goes_through_the_codebook(tmp_path: Path) -> None:
    config = original.tiny_config("bedroom")
    source = traced(config, original.make_checkpoint(config), tmp_path)
    assert source.pipeline is not None
    pipeline = UnconditionalLDMPipeline.from_pretrained(source.pipeline, unet=None)
    latents = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    near, far = (pipeline._decoded(latents + step, "pt") for step in (1e-4, 0.5))
    # Straight-through rounding leaves float noise of 1e-7 on the codes; a step to another code is seen.
    assert torch.allclose(pipeline._decoded(latents, "pt"), near, rtol=0, atol=1e-5)
    assert not torch.allclose(pipeline._decoded(latents, "pt"), far, rtol=0, atol=0.05)


# ---- independent conversions agree ---------------------------------------------------------------------------------


def test_names_agree_with_the_conversion_of_diffusers() -> None:
    """Where diffusers' own conversion covers the case, it puts the same tensors in the same places."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    raw = original.tiny_config("imagenet", num_res_blocks=2, channel_mult=[1, 2, 2], attention_resolutions=[2, 4])
    config, weights = LdmConfig.model_validate(raw["model"]["params"]), original.make_checkpoint(raw)
    unet = build_unet(config.unet)
    theirs = convert_ldm_unet_checkpoint(dict(weights), dict(unet.config))
    ours = {n: weights["model.diffusion_model." + unet_name(n, 2, config.unet.attended)] for n in unet.state_dict()}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)

    vae = build_vae(config, 1.0)
    theirs = convert_ldm_vae_checkpoint(dict(weights), dict(vae.config))
    ours = {n: weights["first_stage_model." + vae_name(n, 2)] for n in vae.state_dict() if "quantize" not in n}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].reshape(ours[name].shape), ours[name]) for name in ours)


@torch.no_grad()
def test_the_schedule_is_the_checkpoints(tmp_path: Path) -> None:
    config = original.tiny_config("church")
    weights = original.make_checkpoint(config)
    source = traced(config, weights, tmp_path)
    assert source.pipeline is not None
    scheduler = UnconditionalLDMPipeline.from_pretrained(source.pipeline, unet=None).scheduler
    assert torch.allclose(scheduler.alphas_cumprod, weights["alphas_cumprod"], rtol=1e-4, atol=0)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == [951 - 50 * i for i in range(20)]
    # The last step ends at the first ᾱ, not at 1.
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]


def test_the_temporary_pipeline_goes_with_the_source(tmp_path: Path) -> None:
    config = original.tiny_config("bedroom")
    source = traced(config, original.make_checkpoint(config), tmp_path)
    folder = source.pipeline
    assert folder is not None
    assert folder.is_dir()
    del source
    gc.collect()
    assert not folder.exists()


# ---- the whole way -------------------------------------------------------------------------------------------------


def hqc(*arguments: object) -> Any:
    result = CliRunner(catch_exceptions=False).invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.mark.parametrize("kind", ["imagenet", "church"])
def test_from_checkpoint_to_images(kind: str, tmp_path: Path) -> None:
    config = original.tiny_config(kind, channel_mult=[1, 2], attention_resolutions=[2])
    checkpoint = save_ckpt(original.make_checkpoint(config, ema=True), tmp_path / "model.ckpt")
    settings = original.save_config(config, tmp_path / "config.yaml")
    program, rtn, exported = tmp_path / "float.hqc", tmp_path / "rtn.hqc", tmp_path / "onnx"
    steps = ("--num-inference-steps", "2")
    said = json.loads(hqc("trace", checkpoint, "--config", settings, "-o", program, "--json").stdout)
    assert said["weights"] == "model_ema"
    assert said["graph_equals_module_relative_error"] < EQUAL
    checkpoint.unlink()  # the program carries everything

    task = task_of(load_program(program), folder=pipeline_folder(program))
    assert task.latent_shape == (3 if kind == "imagenet" else 4, 8, 8)
    assert (task.draw_conditions is not None) is (kind == "imagenet")
    assert task.timesteps(20)[0] == 1

    hqc("ptq", program, "-o", rtn, *steps, "--calib-size", "2")
    hqc("export", rtn, "-o", exported)
    labels = ("--labels", "0-2", "--per-class", "1") if kind == "imagenet" else ()
    image = tmp_path / "images.png"
    hqc("sample", exported, "--compare-with", program, "-o", image, *labels, *steps)
    assert image.read_bytes().startswith(b"\x89PNG")

    # Images of no digits: nearness to the float model's, without the digit classifier's figures.
    common = ("--images", "2", *steps, "--json")
    figures = json.loads(hqc("eval", exported, "--against", program, *common).stdout)
    assert figures["num_images"] == 2
    assert 0 < figures["psnr_db"] < 60
    assert "fid_reference" not in figures
    assert figures["protocol"]["guidance_scale"] == (1.5 if kind == "imagenet" else 1.0)
    assert figures["protocol"]["image_size"] == "16x16"
    _serve(exported, kind)

    # The integer model's images are those of its fake-quant graph, and not the float model's. Two steps leave no room
    # for codes that flip at a rounding boundary to carry far.
    of_float, of_rtn, of_export = (_images(model, kind) for model in (program, rtn, exported))
    assert of_float.shape == (2, 3, 16, 16)
    quantisation = float((of_float - of_rtn).abs().mean())
    assert float((of_export - of_rtn).abs().mean()) < 0.2 * quantisation


def _serve(model: Path, kind: str) -> None:
    """One request to the server's application, and what it refuses."""
    from fastapi.testclient import TestClient

    from hqc.serving.app import create_app
    from hqc.serving.opening import opened

    with TestClient(create_app([opened(str(model))]), base_url="http://localhost") as client:

        def answer(**body: object) -> tuple[int, dict[str, Any]]:
            response = client.post("/v1/images/generations", json={"num_inference_steps": 2, **body})
            return response.status_code, response.json()

        if kind == "imagenet":
            assert answer(class_label=6)[1]["data"][0]["revised_prompt"] == "class 6"
            assert answer(class_label=7)[1]["error"]["message"] == "class_label: 7, this model has the classes 0 to 6"
            assert answer(prompt="3")[1]["error"]["message"] == (
                "prompt: this model knows no words; send class_label 0 to 6"
            )
        else:
            status, body = answer(prompt="a church")
            assert (status, len(body["data"])) == (200, 1)
            assert body["data"][0]["revised_prompt"] == "a sample of an unconditional model: no prompt was used"
            assert answer(class_label=3)[0] == 400


def _images(model: Path, kind: str) -> Tensor:
    pipeline = load(model).pipeline()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    options = {"num_inference_steps": 2, "generator": generators, "output_type": "pt"}
    if kind == "imagenet":
        assert isinstance(pipeline, ClassConditionalLDMPipeline)
        return torch.as_tensor(pipeline([3, 4], **options).images)
    assert isinstance(pipeline, UnconditionalLDMPipeline)
    return torch.as_tensor(pipeline(2, **options).images)


# ---- full size -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_ldm4_imagenet_at_full_size(tmp_path: Path) -> None:
    """cin256-v2 as published: 400.9 M parameters, one forward at batch 1 against the original modules."""
    config = original.tiny_config(
        "imagenet",
        image_size=64,
        model_channels=192,
        attention_resolutions=[8, 4, 2],
        num_res_blocks=2,
        channel_mult=[1, 2, 3, 5],
        num_heads=1,
        context_dim=512,
    )
    params = config["model"]["params"]
    params["first_stage_config"]["params"]["n_embed"] = 8192
    coder = {"resolution": 256, "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2}
    params["first_stage_config"]["params"]["ddconfig"].update(coder)
    params["cond_stage_config"]["params"].update({"n_classes": 1001, "embed_dim": 512})
    weights = original.make_checkpoint(config)
    source = traced(config, weights, tmp_path)
    assert sum(p.numel() for p in source.module.parameters()) == 400_920_579

    sample = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    inputs = (sample, torch.tensor([500.0]), weights["cond_stage_model.embedding.weight"][[207]][:, None])
    wanted = original.unet(weights, params["unet_config"]["params"], *inputs)
    assert float((source.module(*inputs) - wanted).norm() / wanted.norm()) < EQUAL
