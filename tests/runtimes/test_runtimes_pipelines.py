"""hqc's denoiser in diffusers' own pipelines: the same latents as with the module that it was captured from."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from denoisers import captured_denoiser, denoiser
from torch import Tensor, nn

from hqc.capture.families import call_arguments
from hqc.errors import EvaluationError
from hqc.export import export_program
from hqc.runtimes import load
from hqc.storage import save_program

# diffusers hands torch tensors to numpy 2 in its own schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

STEPS = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False}


def _vae(channels: int = 4) -> nn.Module:
    """An autoencoder of factor 2, small enough to be there only for the pipelines' checks."""
    from diffusers import AutoencoderKL

    torch.manual_seed(40)
    return AutoencoderKL(  # type: ignore[no-any-return]
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
        shift_factor=0.0,
    )


def _ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _flow() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _embeds(*shape: int, seed: int = 50) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _stable_diffusion(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=model,
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    call = {"prompt_embeds": _embeds(2, 5, 32), "negative_prompt_embeds": _embeds(2, 5, 32, seed=51)}
    return pipe, {**call, "height": 16, "width": 16}


def _stable_diffusion_xl(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=None,
        text_encoder_2=_TextEncoder(32),  # only its projection's width is read
        tokenizer=None,
        tokenizer_2=None,
        unet=model,
        scheduler=_ddim(),
        add_watermarker=False,
    )
    call = {
        "prompt_embeds": _embeds(2, 5, 32),
        "negative_prompt_embeds": _embeds(2, 5, 32, seed=51),
        "pooled_prompt_embeds": _embeds(2, 32, seed=52),
        "negative_pooled_prompt_embeds": _embeds(2, 32, seed=53),
    }
    return pipe, {**call, "height": 16, "width": 16}


class _TextEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(projection_dim=width)
        self.dtype, self.device = torch.float32, torch.device("cpu")


def _dit(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    from diffusers import DiTPipeline

    pipe = DiTPipeline(transformer=model, vae=_vae(), scheduler=_ddim())
    return pipe, {"class_labels": [1, 3]}


def _pixart(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline(tokenizer=None, text_encoder=None, vae=_vae(), transformer=model, scheduler=_ddim())
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    call = {
        "prompt_embeds": _embeds(2, 5, 24),
        "negative_prompt_embeds": _embeds(2, 5, 24, seed=51),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }
    return pipe, {**call, "negative_prompt": None, "height": 16, "width": 16, "use_resolution_binning": False}


def _sd3(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusion3Pipeline

    nothing = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    pipe = StableDiffusion3Pipeline(transformer=model, scheduler=_flow(), vae=_vae(), **nothing)
    call = {
        "prompt_embeds": _embeds(2, 5, 32),
        "negative_prompt_embeds": _embeds(2, 5, 32, seed=51),
        "pooled_prompt_embeds": _embeds(2, 64, seed=52),
        "negative_pooled_prompt_embeds": _embeds(2, 64, seed=53),
    }
    return pipe, {**call, "height": 16, "width": 16}


def _flux(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxPipeline

    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline(transformer=model, scheduler=_flow(), vae=_vae(), **nothing)
    call = {"prompt_embeds": _embeds(2, 5, 32), "pooled_prompt_embeds": _embeds(2, 24, seed=52)}
    return pipe, {**call, "height": 16, "width": 16}


PIPELINES = {
    "sd15": _stable_diffusion,
    "sd21": _stable_diffusion,
    "sdxl": _stable_diffusion_xl,
    "dit": _dit,
    "pixart_512": _pixart,
    "sd3": _sd3,
    "flux": _flux,
}


def _latents(pipe: Any, call: dict[str, Any]) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad(), warnings.catch_warnings():
        # diffusers' own deprecations, of a version or another.
        warnings.simplefilter("ignore", FutureWarning)
        return torch.as_tensor(pipe(**call, **STEPS, generator=_generator())[0])  # DiT's decodes into an array


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", PIPELINES)
def test_drop_in(name: str, runtime: str, tmp_path) -> None:
    model, program = denoiser(name), captured_denoiser(name)
    pipe, call = PIPELINES[name](model)
    wanted = _latents(pipe, call)
    if runtime == "torch":
        save_program(program, tmp_path / "x")
    else:
        export_program(program, "onnxruntime", tmp_path / "x")
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    setattr(pipe, part, load(tmp_path / "x", threads=1).as_denoiser())
    found = _latents(pipe, call)
    # Two steps of float32 rounding.
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert wanted.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["sd21", "sdxl", "pixart_512", "sd3", "flux"])
def test_a_pipeline_in_half_precision(name: str, dtype: torch.dtype, tmp_path) -> None:
    """`pipe.to(dtype)` reaches the drop-in, which says so to the pipeline; the session goes on in its own type."""
    pipe, call = PIPELINES[name](denoiser(name))
    wanted = _latents(pipe, call)
    save_program(captured_denoiser(name), tmp_path / "x")
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    setattr(pipe, part, load(tmp_path / "x").as_denoiser())
    pipe.to(dtype)
    assert getattr(pipe, part).dtype == dtype
    if name == "sdxl":
        pipe.text_encoder_2.dtype = dtype  # a stand-in, which has no weights to cast
    half = {key: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for key, v in call.items()}
    found = _latents(pipe, half)
    assert found.dtype == dtype
    # Two steps of 7 or 10 bits of mantissa in the latents.
    assert (found.float() - wanted).norm() <= (0.05 if dtype == torch.bfloat16 else 0.01) * wanted.norm()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "labelled", "dit", "sd3"])
def test_it_returns_what_the_module_returns(name: str, tmp_path) -> None:
    model, program = denoiser(name), captured_denoiser(name)
    save_program(program, tmp_path / "x")
    unet = load(tmp_path / "x").as_denoiser()
    named = dict(zip((s.name for s in program.inputs), program.example_inputs(2), strict=True))
    call = call_arguments(type(model).__name__, named)
    with torch.no_grad():
        for return_dict in (True, False):
            wanted, found = (one(**call, return_dict=return_dict) for one in (model, unet))
            assert type(found) is type(wanted)
            assert torch.allclose(found[0], wanted[0], rtol=1e-3, atol=1e-4)
        assert torch.equal(unet(**call).sample, unet(**call, return_dict=False)[0])


def test_threads_share_a_session(tmp_path) -> None:
    """ONNX Runtime runs one session from several threads; each has a drop-in of its own."""
    program = captured_denoiser("sd15")
    export_program(program, "onnxruntime", tmp_path / "x", verify_batch=1)
    model = load(tmp_path / "x", threads=1)
    inputs = [program.example_inputs(2, seed) for seed in range(8)]
    alone = [model.as_denoiser()(*args).sample for args in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda args: model.as_denoiser()(*args).sample, inputs * 4))
    assert all(torch.equal(one, alone[i % len(alone)]) for i, one in enumerate(found))
    assert model.as_denoiser().session is model.session


def test_a_pipeline_of_another_size_is_refused(tmp_path) -> None:
    pipe, call = _stable_diffusion(denoiser("sd21"))
    save_program(captured_denoiser("sd21"), tmp_path / "x")
    pipe.unet = load(tmp_path / "x").as_unet()
    with pytest.raises(EvaluationError, match=r"sample: has shape \[4, 4, 16, 16\]; expected \[4, 4, 8, 8\]"):
        _latents(pipe, {**call, "height": 32, "width": 32})


def test_conditions_by_name_and_in_order(tmp_path) -> None:
    program = captured_denoiser("sdxl")
    save_program(program, tmp_path / "x")
    session = load(tmp_path / "x").session
    sample, timestep, *conditions = program.example_inputs(2)
    wanted = session(sample, timestep, *conditions)
    names = [spec.name for spec in program.inputs][2:]
    assert torch.equal(session(sample, timestep, **dict(zip(names, conditions, strict=True))), wanted)
    assert torch.equal(
        session(sample, timestep, conditions[0], time_ids=conditions[2], text_embeds=conditions[1]), wanted
    )
    with pytest.raises(EvaluationError, match="time_ids: is missing"):
        session(sample, timestep, *conditions[:2])
    with pytest.raises(EvaluationError, match="text_embeds: is given twice"):
        session(sample, timestep, *conditions, text_embeds=conditions[1])
    with pytest.raises(EvaluationError, match=r"class_labels: the denoiser takes sample, .* captured without"):
        session(sample, timestep, *conditions, class_labels=torch.zeros(2))
    with pytest.raises(EvaluationError, match=r"takes 3 conditions .* and was given more"):
        session(sample, timestep, *conditions, sample)


def test_what_all_samples_share(tmp_path) -> None:
    """img_ids [1, L, 3] as [L, 3], guidance as one number, a timestep for all."""
    program = captured_denoiser("flux")
    save_program(program, tmp_path / "x")
    session = load(tmp_path / "x").session
    named = dict(zip((s.name for s in program.inputs), program.example_inputs(2), strict=True))
    sample, _ = named.pop("sample"), named.pop("timestep")
    named["guidance"] = torch.full((2,), 3.5)
    wanted = session(sample, torch.full((2,), 0.5), **named)
    shared = {**named, "guidance": torch.tensor([3.5]), "img_ids": named["img_ids"][None]}
    assert torch.equal(session(sample, 0.5, **shared), wanted)


def test_class_labels_are_whole_numbers(tmp_path) -> None:
    program = captured_denoiser("dit")
    export_program(program, "onnxruntime", tmp_path / "x")
    model = load(tmp_path / "x").as_denoiser()
    sample, timestep, labels = program.example_inputs(2)
    assert labels.dtype == torch.int64
    wanted = model(sample, timestep=timestep, class_labels=labels).sample
    assert torch.equal(model(hidden_states=sample, timestep=timestep, class_labels=labels.int()).sample, wanted)
    with pytest.raises(EvaluationError, match=r"option 'encoder_hidden_states'|option 'condition'"):
        model(sample, timestep, labels, encoder_hidden_states=sample)
    with pytest.raises(EvaluationError, match="denoiser: cannot be called like that"):
        model(sample, timestep, labels, sample)
