"""diffusers denoisers of every family: their inputs, what is captured, and which layers keep 8 bits."""

from functools import cache

import denoisers
import pytest
import torch
from denoisers import DENOISERS, TRANSFORMERS, captured_denoiser, denoiser

from hqc.capture.diffusers_models import denoiser_source
from hqc.capture.families import FAMILIES, call_arguments, plain_arguments
from hqc.errors import CaptureError
from hqc.passes import InsertHadamard, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.plan import QuantPlan
from hqc.program import InputSpec

INPUTS = {
    "sd15": {"sample": ("N", 4, 8, 8), "timestep": ("N",), "condition": ("N", 5, 32)},
    "sd21": {"sample": ("N", 4, 8, 8), "timestep": ("N",), "condition": ("N", 5, 32)},
    "sdxl": {
        "sample": ("N", 4, 8, 8),
        "timestep": ("N",),
        "condition": ("N", 5, 32),
        "text_embeds": ("N", 32),
        "time_ids": ("N", 6),
    },
    "inpainting": {"sample": ("N", 9, 8, 8), "timestep": ("N",), "condition": ("N", 5, 32)},
    "labelled": {"sample": ("N", 3, 8, 8), "timestep": ("N",), "class_labels": ("N",)},
    "dit": {"sample": ("N", 4, 8, 8), "timestep": ("N",), "class_labels": ("N",)},
    "pixart_512": {
        "sample": ("N", 4, 8, 8),
        "timestep": ("N",),
        "condition": ("N", 5, 24),
        "encoder_attention_mask": ("N", 5),
    },
    "pixart": {
        "sample": ("N", 4, 8, 8),
        "timestep": ("N",),
        "condition": ("N", 5, 24),
        "encoder_attention_mask": ("N", 5),
        "resolution": ("N", 2),
        "aspect_ratio": ("N", 1),
    },
    "sd3": {
        "sample": ("N", 4, 8, 8),
        "timestep": ("N",),
        "condition": ("N", 5, 32),
        "pooled_projections": ("N", 64),
    },
    "flux": {
        "sample": ("N", 16, 16),
        "timestep": ("N",),
        "condition": ("N", 5, 32),
        "pooled_projections": ("N", 24),
        "img_ids": (16, 3),
        "txt_ids": (5, 3),
        "guidance": ("N",),
    },
}


def test_every_family_has_a_tiny_denoiser() -> None:
    assert {type(denoiser(name)).__name__ for name in DENOISERS} == set(FAMILIES)
    assert INPUTS.keys() == DENOISERS.keys()


@pytest.mark.parametrize("name", DENOISERS)
def test_captured_as_diffusers_computes_it(name: str) -> None:
    program, model = captured_denoiser(name), denoiser(name)
    assert {spec.name: spec.shape for spec in program.inputs} == INPUTS[name]
    args = program.example_inputs(3, seed=5)
    named = dict(zip(INPUTS[name], args, strict=True))
    added = {key: named.pop(key) for key in ("text_embeds", "time_ids", "resolution", "aspect_ratio") if key in named}
    options = {"added_cond_kwargs": added} if added else {}
    first = "sample" if "UNet" in type(model).__name__ else "hidden_states"
    call = {first: named.pop("sample"), **named}
    if "condition" in call:
        call["encoder_hidden_states"] = call.pop("condition")
    with torch.no_grad():
        wanted = model(**call, **options, return_dict=False)[0]
        found = program.module()(*args)
    # The same operators in the same order.
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert wanted.norm() > 0


@pytest.mark.parametrize("name", DENOISERS)
def test_every_input_matters(name: str) -> None:
    """A wrapper that drops an input would pass the test above if the model did not use it."""
    program = captured_denoiser(name)
    module, args = program.module(), list(program.example_inputs(2, seed=1))
    with torch.no_grad():
        before = module(*args)
        for i, spec in enumerate(program.inputs):
            changed = [*args]
            low, high = spec.span or (0, 2)
            changed[i] = (args[i] + 1) % int(high) if spec.dtype == "int64" else args[i] + 0.37 * (high - low)
            assert (module(*changed) - before).norm() > 1e-4 * before.norm(), spec.name


def test_examples_stay_in_range() -> None:
    labels = captured_denoiser("dit").inputs[2]
    assert (labels.dtype, labels.span) == ("int64", (0, 1001))  # a thousand classes and the null class
    drawn = labels.example(20_000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(1001))
    timestep = captured_denoiser("flux").inputs[1].example(500, torch.Generator().manual_seed(0))
    assert 0 <= float(timestep.min()) < 0.1 < 0.9 < float(timestep.max()) <= 1


def test_the_refiner_has_five_ids() -> None:
    """SDXL's refiner: 2560 = 1280 + 5·256; the base model: 2816 = 1280 + 6·256."""
    from diffusers import UNet2DConditionModel

    shapes = {}
    for total in (2560, 2816):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=total,
        )
        shapes[total] = {s.name: s.shape for s in denoiser_source(unet, "x").inputs}
    assert shapes[2560]["time_ids"] == ("N", 5)
    assert shapes[2816]["time_ids"] == ("N", 6)
    assert shapes[2560]["text_embeds"] == shapes[2816]["text_embeds"] == ("N", 1280)


# ---- refusals ------------------------------------------------------------------------------------------------------


def _unet(**options):
    return denoisers._unet(attention_head_dim=8, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _unet(class_embed_type="identity"), "class_embed_type: is 'identity', which hqc has no input for"),
        (
            lambda: _unet(addition_embed_type="image", encoder_hid_dim=16),
            "addition_embed_type: is 'image', which hqc has no input for",
        ),
        (
            lambda: _unet(encoder_hid_dim_type="image_proj", encoder_hid_dim=16),
            "encoder_hid_dim_type: is 'image_proj', which hqc has no input for",
        ),
        (lambda: _unet(sample_size=None), r"sample_size: is not in the model's configuration\. Give --latent-size"),
    ],
    ids=["class labels", "added conditions", "condition", "size"],
)
def test_unets_with_other_conditions_say_so(build, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        denoiser_source(build(), "x")


def test_a_class_without_wrapper_is_named() -> None:
    from diffusers import AutoencoderKL

    with pytest.raises(CaptureError, match="denoiser AutoencoderKL: is none that hqc has a wrapper for"):
        denoiser_source(AutoencoderKL(norm_num_groups=1, block_out_channels=(4,)), "x")


# ---- calls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_calls_there_and_back(kind: str) -> None:
    """hqc's names to diffusers' keywords and back again."""
    named = dict.fromkeys(("sample", "timestep", "condition", "text_embeds", "class_labels"), 1)
    assert plain_arguments(kind, (), call_arguments(kind, named)) == named


def test_positional_arguments_follow_the_class() -> None:
    assert plain_arguments("UNet2DConditionModel", (1, 2, 3), {}) == {"sample": 1, "timestep": 2, "condition": 3}
    assert plain_arguments("SD3Transformer2DModel", (1, 2, 3, 4), {"joint_attention_kwargs": None}) == {
        "sample": 1,
        "condition": 2,
        "pooled_projections": 3,
        "timestep": 4,
    }
    assert plain_arguments("unknown", (1, 2), {"cross_attention_kwargs": {}}) == {"sample": 1, "timestep": 2}
    with pytest.raises(TypeError, match="takes 3 positional arguments"):
        plain_arguments("DiTTransformer2DModel", (1, 2, 3, 4), {})
    with pytest.raises(TypeError, match="'hidden_states' twice"):
        plain_arguments("DiTTransformer2DModel", (1,), {"hidden_states": 2})


# ---- rules ---------------------------------------------------------------------------------------------------------


@cache
def planned(name: str) -> QuantPlan:
    return run_pipeline(captured_denoiser(name), [SelectLayers(bits="w4a4"), InsertHadamard()]).plan


MODULATIONS = {
    "dit": {"transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1.linear", "proj_out_1"},
    "pixart": {"adaln_single.linear"},
    "sd3": {f"transformer_blocks.{i}.{n}.linear" for i in (0, 1) for n in ("norm1", "norm1_context")}
    | {"norm_out.linear"},
    "flux": {
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
        "norm_out.linear",
    },
}
EDGES = {
    "dit": {"pos_embed.proj", "proj_out_2"},
    "pixart": {"pos_embed.proj", "caption_projection.linear_1", "caption_projection.linear_2", "proj_out"},
    "sd3": {"pos_embed.proj", "context_embedder", "proj_out"},
    "flux": {"x_embedder", "context_embedder", "proj_out"},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_keeps_eight_bits_in_a_transformer(name: str) -> None:
    """Modulations (rotated), edges and embedders (not rotated); everything else has the asked bits and a rotation."""
    plan = planned(name)
    eight = {p.site for p in plan.quantised if p.weight_bits == 8}
    embedders = {p.site for p in plan.quantised if "_embedder.linear_" in p.site}
    assert embedders
    assert eight == MODULATIONS[name] | EDGES[name] | embedders
    for site in MODULATIONS[name]:
        assert (plan[site].activation_bits, plan[site].block >= 8) == (8, True)
    for site in EDGES[name] | embedders:
        assert plan[site].block == 0
        assert plan[site].reason.startswith("unrotated: ")
    rest = [p for p in plan.quantised if p.site not in eight]
    assert rest
    assert all((p.weight_bits, p.activation_bits) == (4, 4) and p.block in (16, 32) for p in rest)


def test_embeddings_of_sdxl_are_treated_as_the_time_embedding() -> None:
    plan = planned("sdxl")
    for site in ("add_embedding.linear_1", "add_embedding.linear_2", "time_embedding.linear_1"):
        assert (plan[site].weight_bits, plan[site].block) == (8, 0)
    # Projections inside a UNet's blocks are not the transformer's edges.
    inside = [p for p in plan.sites if p.site.endswith((".proj_in", ".proj_out"))]
    assert inside
    assert all(p.weight_bits == 4 for p in inside)


def test_the_rules_of_all_ask_modulations_for_few_bits() -> None:
    plan = run_pipeline(captured_denoiser("dit"), [SelectLayers(bits="w4a4", rules="all")]).plan
    assert plan["transformer_blocks.0.norm1.linear"].weight_bits == 4
    assert plan["pos_embed.proj"].weight_bits == 8


def test_a_site_whose_rows_are_not_samples_is_reported() -> None:
    """PixArt embeds height and width of all samples as 2N rows: a scale per sample does not fit."""
    plan = planned("pixart")
    site = plan["adaln_single.emb.resolution_embedder.linear_1"]
    assert not site.quantised
    assert "the first axis of its input ['2*N', 256] is not the batch" in site.reason


def test_inputs_are_plain_data() -> None:
    from dataclasses import asdict

    for name in DENOISERS:
        for spec in captured_denoiser(name).inputs:
            assert InputSpec.from_dict(asdict(spec)) == spec
