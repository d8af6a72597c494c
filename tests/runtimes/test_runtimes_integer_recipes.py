"""Programs as recipes make them: the `torch-int8` runtime itself, `torch-cuda`'s graph with kernels in plain torch."""

from functools import cache
from typing import Any

import pytest
import torch
from integer_programs import relative
from tiny_pipeline import traced_pipeline
from torch import Tensor

from hqc import api
from hqc.program import Program
from hqc.recipes import RECIPES
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.cpu import CpuSession
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.kernel_set import reference_kernels

NAMES = ("svdquant", "passionsr", "ganq-int8", "tcaq-dm", "q-diffusion")
FLOAT_ATTENTION = ("tcaq-dm", "q-diffusion")
FEW: dict[str, dict[str, Any]] = {
    "smooth": {"samples": 1, "timesteps": 2, "rows": 8, "candidates": 2},
    "calibrate_activations": {"samples": 1, "candidates": 8},
    "decompose": {"samples": 1, "timesteps": 2, "rows": 16, "rounds": 2, "candidates": 10},
    "reconstruct": {"samples": 1, "timesteps": 2, "iterations": 2, "batch_size": 2},
    "learn_factors": {"updates": 2, "batch_size": 2},
    "learn_bounds": {"updates": 2, "batch_size": 2},
    "choose_softmax": {"samples": 1},
    "fit_lookup": {"samples": 1, "timesteps": 2, "rows": 16, "rounds": 1},
}


@cache
def quantised(name: str) -> Program:
    """The tiny class-conditional denoiser by a recipe with next to no samples."""
    found = RECIPES[name]
    steps = "num_inference_steps" if found.sampler.timestep is None else "timestep"
    found = found.set(f"sampler.{steps}", 2)
    for step, options in FEW.items():
        found = found.having(step, **options) if found.step(step) is not None else found
    return api.quantise(traced_pipeline("classes"), found, "w4a4")


def errors(found: Tensor, wanted: Tensor) -> list[float]:
    """Of every sample, smallest first."""
    return sorted(relative(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("runtime", ["torch-int8", "torch-cuda"])
def test_it_computes_what_the_integer_program_computes(name: str, runtime: str, native_cache: Any) -> None:
    """Mixed timesteps. A value on a rounding boundary may flip by a step, and that goes on to the output."""
    program, original = quantised(name), traced_pipeline("classes")
    inputs = program.example_inputs(4, seed=7)
    wanted = integer_form(program, runtime).module()(*inputs)
    if runtime == "torch-int8":
        session = CpuSession(program, cache=native_cache)
        found, report = session(*inputs), session.report
    else:
        module = integer_module(program, reference_kernels(), BuildOptions(torch.device("cpu"), torch.float32))
        found, report = module(*inputs), module.meta["report"]
    assert errors(found, wanted)[1] <= 1e-5
    assert relative(found, wanted) <= relative(wanted, original.module()(*inputs))
    assert ("attention runs in float" in report.attention) == (name in FLOAT_ATTENTION)
