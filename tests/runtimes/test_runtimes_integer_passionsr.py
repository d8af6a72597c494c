"""What `passionsr` quantises in the GPU runtime's graph, its kernels in plain torch: shifted sites, no timestep."""

import pytest
import torch
from integer_programs import relative
from tiny_pipeline import traced_pipeline

import hqc
from hqc import api
from hqc.program import Program
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.kernel_set import reference_kernels

FEW = {
    "smooth.samples": 2,
    "learn_factors.updates": 2,
    "learn_factors.batch_size": 2,
    "calibrate_activations.samples": 4,
    "calibrate_activations.candidates": 8,
    "learn_bounds.updates": 2,
    "learn_bounds.batch_size": 2,
    "sampler.timestep": 99.0,
}


def _quantised(part: str, bits: str) -> Program:
    program = traced_pipeline("classes", part)
    return hqc.qat(program, "passionsr", bits, task=api.task_of(program, synthetic=True), settings=FEW)


@pytest.mark.parametrize(("part", "bits"), [("denoiser", "w6a6"), ("vae-decoder", "w8a8"), ("vae-encoder", "w6a6")])
def test_it_computes_what_the_integer_program_computes(part: str, bits: str) -> None:
    program = _quantised(part, bits)
    inputs = program.example_inputs(3, seed=7)
    reference = integer_form(program).module()(*inputs)
    for fuse in (False, True):
        options = BuildOptions(torch.device("cpu"), torch.float32, pack=True, fuse=fuse)
        found = integer_module(program, reference_kernels(), options)(*inputs)
        # A code on a rounding boundary may flip (sums in another order) and part what follows.
        assert relative(found, reference) <= 0.02
