"""The module that training runs: the program's values and gradients, with rotations where they are cheapest."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from hqc.passes import AttachLora, InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program
from hqc.training.module import training_module

HQ_DM = InsertHadamard()
TRAINED = ("lora", "scale", "zero")
MODELS = ("two_sites", "odd_channels", "geometry", "shared_input", "cross_attention")


@pytest.fixture
def student(captured: Callable[[str], Program]) -> Callable[..., Program]:
    """student(name): quantised and rotated, with LoRA factors that are not zero and scales that clip.

    ranges: symmetric, or asymmetric with zero points beside the middle.
    """

    def make(name: str, rotation: InsertHadamard = HQ_DM, ranges: str = "symmetric") -> Program:
        insert = InsertQdq((0.0, 500.0), activation=ranges, weight=ranges)  # type: ignore[arg-type]
        passes = [SelectLayers(bits="w4a4"), rotation, insert, AttachLora(rank=4)]
        program, generator = run_pipeline(captured(name), passes), torch.Generator().manual_seed(1)
        state = dict(program.state)
        for key, tensor in state.items():
            if key.endswith("lora_b"):
                state[key] = 0.02 * torch.randn(tensor.shape, generator=generator)
            if key.endswith("scale_table"):
                state[key] = 0.2 + 0.1 * torch.rand(tensor.shape, generator=generator)
            if key.endswith("zero_table"):
                state[key] = 4 + 7 * torch.rand(tensor.shape, generator=generator)
        return program.evolve(state=state)

    return make


def as_double(tensor: Tensor) -> Tensor:
    """Floats only: whole numbers are indices."""
    return tensor.double() if tensor.is_floating_point() else tensor


def doubled(program: Program) -> Program:
    """With all its weights in float64."""
    return program.evolve(state={name: as_double(tensor) for name, tensor in program.state.items()})


def gradients(module: nn.Module, program: Program, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients of a weighted sum of it to everything that can be trained."""
    parameters = {name: p for name, p in module.named_parameters() if any(part in name for part in TRAINED)}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    output = module(*(as_double(tensor) for tensor in program.example_inputs(batch, seed=5)))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((output * weights).sum(), list(parameters.values()), allow_unused=True)
    return output.detach(), {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def rotations(module: nn.Module) -> list[fx.Node]:
    """The inputs of layers that are rotated back."""
    assert isinstance(module, fx.GraphModule)
    return [node for node in module.graph.nodes if node.meta.get("role") == "rotation_back"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch", [1, 64])
def test_values_and_gradients_are_the_programs(student: Callable[[str], Program], model: str, batch: int) -> None:
    """In float64, where a code on a rounding boundary does not flip for the order of a sum."""
    assert_same(doubled(student(model)), batch)


@pytest.mark.parametrize("model", ["two_sites", "geometry"])
@pytest.mark.parametrize("batch", [1, 64])
def test_asymmetric_ranges_learn_their_zero_points(student: Callable[..., Program], model: str, batch: int) -> None:
    program = doubled(student(model, ranges="asymmetric"))
    assert_same(program, batch)
    _, found = gradients(training_module(program, batch), program, batch)
    for kind in ("activation_zero_table", "weight_zero"):
        learnt = [bool((gradient != 0).any()) for name, gradient in found.items() if name.endswith(kind)]
        assert len(learnt) == len(program.plan.quantised)
        assert any(learnt), kind  # where something is clipped


@pytest.mark.parametrize("weights", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("batch", [1, 64])
def test_a_regular_rotation_keeps_its_kind(student: Callable[..., Program], batch: int, weights: bool) -> None:
    program = student("wide_channels", InsertHadamard(64, kind="regular", weights=weights))
    assert_same(doubled(program), batch)
    assert len(rotations(program.module())) == (0 if weights else 4)


def assert_same(program: Program, batch: int) -> None:
    wanted, wanted_gradients = gradients(program.module(), program, batch)
    found, found_gradients = gradients(training_module(program, batch), program, batch)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert found_gradients.keys() == wanted_gradients.keys()
    assert any("lora_a" in name for name in found_gradients)
    for name, gradient in wanted_gradients.items():
        assert torch.allclose(found_gradients[name], gradient, rtol=1e-7, atol=1e-9 * float(gradient.abs().max())), name


def test_a_weight_is_rotated_where_it_has_fewer_values(student: Callable[[str], Program]) -> None:
    program = student("two_sites")
    every = len(rotations(program.module()))
    assert every == 2
    assert len(rotations(training_module(program, 1))) > len(rotations(training_module(program, 4096))) == 0
    assert len(rotations(program.module())) == every, "the program stays as it is"
