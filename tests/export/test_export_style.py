"""LoRAs beside integer products in exports: their scales are inputs, one a sample, and every runtime agrees."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from lora_files import layers_of, save_lora, tensors

import hqc
from hqc.errors import EvaluationError, ExportError, RuntimeMissingError
from hqc.export import export_program
from hqc.export.reference import verification_inputs
from hqc.program import Program
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.ort_runtime import OrtSession
from hqc.runtimes.torch_runtime import TorchSession
from hqc.runtimes.unet import as_unet

Captured = Callable[[str], Program]
EQUAL_CODES = 5e-6  # float32 sums in another order


def quantised_at_w4a4(program: Program, hadamard: bool) -> Program:
    """Calibrated on random inputs."""

    def loop(unet) -> None:
        for seed, timestep in enumerate((0.0, 500.0, 999.0)):
            sample, _, *conditions = program.example_inputs(3, seed)
            unet.session(sample, timestep, *conditions)

    quick = {"calibrate_activations.candidates": 10, "calibrate_weights.candidates": 10}
    return hqc.ptq(program, "rtn", "w4a4", hadamard=hadamard, forward_loop=loop, settings=quick)


@pytest.fixture(scope="module")
def styled(captured: Captured, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Program]:
    """styled("two_sites", hadamard): quantised at w4a4, with two LoRAs attached, the second 0.5 unless given."""
    folder, found = tmp_path_factory.mktemp("loras"), {}

    def build(name: str, hadamard: bool = True) -> Program:
        if (name, hadamard) not in found:
            program = captured(name)
            files = [
                save_lora(folder / f"{name}_{seed}.safetensors", tensors(layers_of(program, seed=seed), "bare"))
                for seed in (1, 2)
            ]
            quantised = quantised_at_w4a4(program, hadamard)
            found[name, hadamard] = hqc.attach_loras(quantised, [f"one={files[0]}", f"two={files[1]}:0.5"])
        return found[name, hadamard]

    return build


@pytest.mark.parametrize(
    ("model", "hadamard", "target"),
    [
        *((model, True, target) for model in ("two_sites", "geometry") for target in ("portable", "onnxruntime")),
        ("two_sites", False, "onnxruntime"),
        ("shared_weights", True, "onnxruntime"),
        ("unconditional", True, "onnxruntime"),
    ],
)
def test_exports_equal_torch(styled, tmp_path: Path, model: str, hadamard: bool, target: str) -> None:
    program = styled(model, hadamard)
    report = export_program(program, target, tmp_path / "x")
    network = report.verification.network
    assert network.forced_error <= EQUAL_CODES
    assert network.quantisation_error > 1e-3
    assert len(report.verification.sites) == len(program.plan.quantised) > 0
    graph = onnx.load(str(tmp_path / "x" / "model.onnx")).graph
    assert ("MatMulIntegerToFloat" in {node.op_type for node in graph.node}) == (target == "onnxruntime")
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert shapes["lora_scale_one"] == shapes["lora_scale_two"] == shapes["timestep"] == ["N"]
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert [(style["name"], style["merged"]) for style in manifest["loras"]] == [("one", False), ("two", False)]


def test_a_scale_is_a_condition_with_a_default(styled, tmp_path: Path) -> None:
    """By name in a session, one number or one a sample; left out it is what it was attached with; 0 is the model."""
    program = styled("two_sites")
    export_program(program, "onnxruntime", tmp_path / "x")
    bare = program.evolve(styles=())
    sample, timestep, *_ = verification_inputs(program, 3)
    for session in (TorchSession(program), OrtSession(tmp_path / "x", threads=1)):
        given = torch.tensor([0.0, 1.0, 0.3])
        found = session(sample, timestep, lora_scale_one=given, lora_scale_two=0.2)
        alone = [
            session(sample[i : i + 1], timestep[i : i + 1], lora_scale_one=s, lora_scale_two=0.2)
            for i, s in enumerate(given.tolist())
        ]
        error = (found - torch.cat(alone)).flatten(1).norm(dim=1) / found.flatten(1).norm(dim=1)
        assert float(error.min()) <= EQUAL_CODES  # a code may flip between batches
        usual = session(sample, timestep)
        torch.testing.assert_close(usual, session(sample, timestep, lora_scale_one=1, lora_scale_two=0.5))
        assert float((usual - found).norm() / found.norm()) > 1e-2
        with pytest.raises(EvaluationError, match="lora_scale_one: has 2 values for 3 samples"):
            session(sample, timestep, lora_scale_one=torch.ones(2))
    wanted = bare.module()(sample, timestep, given, torch.full((3,), 0.2))
    torch.testing.assert_close(
        TorchSession(program)(sample, timestep, lora_scale_one=given, lora_scale_two=0.2), wanted
    )


def test_without_its_loras_a_model_is_what_it_was(captured: Captured, styled, tmp_path: Path) -> None:
    program = captured("two_sites")
    plain = quantised_at_w4a4(program, True)
    args = plain.example_inputs(4)
    off = {"lora_scale_one": 0, "lora_scale_two": 0}
    assert torch.equal(TorchSession(styled("two_sites"))(*args, **off), plain.module()(*args))
    for name, one in (("plain", plain), ("styled", styled("two_sites"))):
        export_program(one, "onnxruntime", tmp_path / name)
    wanted = OrtSession(tmp_path / "plain", threads=1)(*args)
    torch.testing.assert_close(OrtSession(tmp_path / "styled", threads=1)(*args, **off), wanted)


def test_a_denoiser_of_a_pipeline_keeps_scales_and_takes_those_of_a_call(styled) -> None:
    program = styled("two_sites")
    unet = as_unet(TorchSession(program), program.origin.unet_config)
    sample, timestep, *_ = program.example_inputs(2)
    session = TorchSession(program)

    def called(**options) -> torch.Tensor:
        return unet(sample, timestep, return_dict=False, **options)[0]

    assert torch.equal(called(), session(sample, timestep))
    unet.set_lora_scales({"one": 0.2})
    unet.set_lora_scales({"two": torch.tensor([0.0, 0.9])})
    two = torch.tensor([0.0, 0.9])
    assert torch.equal(called(), session(sample, timestep, lora_scale_one=0.2, lora_scale_two=two))
    assert torch.equal(called(lora_scale_one=0.7), session(sample, timestep, lora_scale_one=0.7, lora_scale_two=two))
    with pytest.raises(EvaluationError, match="LoRA pixel: is not attached; there are one, two"):
        unet.set_lora_scales({"pixel": 1.0})


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("unconditional", {"one_timestep": True}),  # whose time embedding is one row, and has a LoRA
        ("two_sites", {"names": "optimum"}),
        ("two_sites", {"opset": 24}),
    ],
)
def test_it_goes_with_the_options_of_an_export(styled, tmp_path: Path, model: str, options) -> None:
    program = styled(model)
    export_program(program, "onnxruntime", tmp_path / "x", **options)
    sample, timestep, *scales = verification_inputs(program, 3)
    found = OrtSession(tmp_path / "x", threads=1)(sample, timestep, *scales)
    wanted = program.module()(sample, timestep, *scales)
    errors = ((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).sort().values
    assert float(errors[0]) <= EQUAL_CODES  # a sample may hold a code that flipped


def test_a_float_program_is_exported_with_it_too(captured: Captured, tmp_path: Path) -> None:
    program = captured("two_sites")
    layers = layers_of(program)
    file = save_lora(tmp_path / "a.safetensors", tensors(layers, "bare"))
    attached = hqc.attach_loras(program, [str(file)])
    export_program(attached, "portable", tmp_path / "x")
    args = attached.example_inputs(2)
    found = OrtSession(tmp_path / "x", threads=1)(*args)
    torch.testing.assert_close(found, attached.module()(*args), rtol=1e-3, atol=1e-4)


def test_targets_without_inputs_for_it_say_so(styled, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="target tensorrt: has no inputs for LoRAs, and one is attached"):
        export_program(styled("two_sites"), "tensorrt", tmp_path / "x")
    with pytest.raises(RuntimeMissingError, match="runtime torch-cuda: has no inputs for LoRAs, and one is attached"):
        integer_form(styled("two_sites"))
