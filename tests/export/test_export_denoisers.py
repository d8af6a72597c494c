"""Every family of denoiser the whole way: calibrated on noise, rotated, quantised, exported, verified, run."""

from functools import cache

import pytest
import torch
from denoisers import DENOISERS, TRANSFORMERS, captured_denoiser

from hqc import api
from hqc.export import export_program
from hqc.program import Program
from hqc.runtimes import load
from hqc.storage import load_program, save_program

# The last block of SD3 drops its context tokens, and with them all that their queries change.
UNHEARD = {"sd3": {"transformer_blocks.1.attn.add_q_proj"}}
SHORT = {"sampler.num_inference_steps": 3, "calibrate_activations.samples": 2}


@cache
def quantised_denoiser(name: str) -> Program:
    program = captured_denoiser(name)
    task = api.task_of(program, synthetic=True)
    return api.ptq(program, "rtn", "w4a4", hadamard=True, task=task, settings=SHORT)


# A portable file of a UNet takes long to verify; labelled stands for the other UNets there, besides those of the zoo.
PORTABLE = ("labelled", *TRANSFORMERS)
# sd15 and inpainting are the zoo's cross_attention at other widths, pixart_512 is pixart without sizes.
ALIKE = ("sd15", "inpainting", "pixart_512")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        *(("portable", name) for name in PORTABLE),
        pytest.param("portable", "sdxl", marks=pytest.mark.long),
        *(pytest.param("onnxruntime", n, marks=pytest.mark.long if n in ALIKE else ()) for n in DENOISERS),
    ],
)
def test_exported(target: str, name: str, tmp_path) -> None:
    program = quantised_denoiser(name)
    report = export_program(program, target, tmp_path / "x", float_program=captured_denoiser(name), verify_batch=2)
    figures = report.verification
    assert len(figures.sites) == len(program.plan.quantised) > 20
    assert figures.network.quantisation_error > 1e-3
    # Read back and run: float32 rounding, or where a code flipped a share of the quantisation error.
    session, args = load(tmp_path / "x").session, program.example_inputs(2, seed=9)
    assert session.inputs == program.inputs
    wanted = program.module()(*args)
    assert (session(*args) - wanted).norm() <= 0.5 * figures.network.quantisation_error * wanted.norm()
    named = dict(zip((spec.name for spec in program.inputs), args, strict=True))
    assert torch.equal(session(named.pop("sample"), named.pop("timestep"), **named), session(*args))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_quantised_transformer_comes_back_from_disk(name: str, tmp_path) -> None:
    program = quantised_denoiser(name)
    save_program(program, tmp_path / "x.hqc")
    again = load_program(tmp_path / "x.hqc")
    assert again.inputs == program.inputs
    args = program.example_inputs(2)
    assert torch.equal(again.module()(*args), program.module()(*args))


@pytest.mark.parametrize("name", ["sdxl", *TRANSFORMERS])
def test_trained(name: str) -> None:
    """A few steps of distillation reach the LoRA factors of every site that has them."""
    program = captured_denoiser(name)
    task = api.task_of(program, synthetic=True)
    settings = {**SHORT, "distil.epochs": 4, "distil.batch_size": 2}
    recipe = api.recipe_of("hq-dm").with_rate("lora_a", 2e-2).with_rate("weight_scale", 1e-4)
    losses = []
    trained = api.qat(program, recipe, "w4a4", task=task, settings=settings, on_update=losses.append)
    assert len(losses) == 12
    assert all(record.loss > 0 for record in losses)
    sites = {plan.site for plan in trained.plan.sites if plan.lora_rank}
    changed = {site for site in sites if bool(trained.state[f"{site}.lora_b"].any())}
    assert changed == sites - UNHEARD.get(name, set())
    assert len(changed) > 10
