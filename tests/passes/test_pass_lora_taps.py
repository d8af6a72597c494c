"""LoRA of taps: what it adds, that it merges to the bit, its ranks, where it starts."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hqc.calibration import InitLora
from hqc.calibration.weights import quantised_weight
from hqc.passes import AttachLora, InsertQdq, MergeLora, SelectLayers
from hqc.passes.rewriting import layer_inputs
from hqc.pipeline import run_pass, run_pipeline, run_procedure
from hqc.program import Program
from hqc.sampling import Work
from hqc.search.joint.gains import _share
from hqc.storage import load_program, save_program
from hqc.structure import site_problems

Captured = Callable[[str], Program]


def with_taps(program: Program, rank: int = 3) -> Program:
    steps = [SelectLayers(bits="w4a4", rules="all"), InsertQdq((0.0, 999.0)), AttachLora(rank=rank, taps=True)]
    return run_pipeline(program, steps)


def learnt(program: Program) -> Program:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.05 * torch.randn(tensor.shape, generator=generator) if name.endswith("lora_b") else tensor
        for name, tensor in program.state.items()
    }
    return program.evolve(state=state)


def test_the_delta_is_the_product_of_every_tap(captured: Captured, tmp_path) -> None:
    program = learnt(with_taps(captured("two_sites")))
    down, up = (program.state[f"conv.lora_{name}"] for name in "ab")
    assert (down.shape, up.shape) == ((9, 3, 32), (9, 16, 3))
    assert (program.state["head.lora_a"].shape, program.state["head.lora_b"].shape) == ((3, 16), (5, 3))
    assert float(down.abs().max()) <= 1 / (32 * 9) ** 0.5
    merged = run_pass(program, MergeLora())
    wanted = np.einsum("tor,trc->oct", up.double().numpy(), down.double().numpy()).reshape(16, 32, 3, 3)
    delta = (merged.state["conv.weight_merged"] - program.state["conv.weight"]).numpy()
    np.testing.assert_allclose(delta, wanted, atol=1e-6)
    args = program.example_inputs(2)
    assert torch.equal(merged.module()(*args), program.module()(*args))
    plain = run_pipeline(captured("two_sites"), [SelectLayers(bits="w4a4", rules="all"), InsertQdq((0.0, 999.0))])
    assert torch.equal(with_taps(captured("two_sites")).module()(*args), plain.module()(*args))
    save_program(program, tmp_path / "x.hqc")
    assert load_program(tmp_path / "x.hqc").plan == program.plan
    assert site_problems(program) == []
    shorter = {**program.state, "conv.lora_a": down[:, :2], "conv.lora_b": up[..., :2]}
    assert any("another rank than 3" in text for text in site_problems(program.evolve(state=shorter)))


def test_ranks_are_those_of_a_tap(captured: Captured) -> None:
    program = with_taps(captured("odd_channels"), rank=64)
    ranks = {plan.site: plan.lora_rank for plan in program.plan.sites}
    assert ranks == {"sixteen": 40, "eight": 12, "none": 3, "three": 3}
    shapes = {site: tuple(program.state[f"{site}.lora_a"].shape) for site in ranks}
    assert shapes == {"sixteen": (40, 48), "eight": (9, 12, 40), "none": (3, 12), "three": (3, 3)}


def test_gradients_reach_both_factors(captured: Captured) -> None:
    module = learnt(with_taps(captured("two_sites"))).module()
    parameters = {name: p.requires_grad_() for name, p in module.named_parameters() if "lora" in name}
    module(*captured("two_sites").example_inputs(1)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in parameters.values())
    assert len(parameters) == 4


def test_it_starts_at_the_error_of_every_tap(captured: Captured) -> None:
    program = with_taps(captured("two_sites"), rank=16)
    found = run_procedure(program, InitLora(), Work(captured("two_sites")))
    quantiser = layer_inputs(dict(program.sites())["conv"])[1]
    weight = program.state["conv.weight"]
    error = weight - quantised_weight(program, quantiser, weight)
    merged = run_pass(found, MergeLora()).state["conv.weight_merged"]
    torch.testing.assert_close(merged - weight, error, atol=1e-5, rtol=1e-3)  # rank 16 of 16 rows is all of it


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_share_of_a_rank_is_over_all_taps(rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(9, 4, 7, generator=generator), torch.randn(9, 5, 4, generator=generator)
    squares = np.linalg.svd((up @ down).double().numpy(), compute_uv=False) ** 2
    assert _share(down, up, rank) == pytest.approx(squares[:, :rank].sum() / squares[:, :4].sum())
    assert _share(down[0], up[0], rank) == pytest.approx(squares[0, :rank].sum() / squares[0, :4].sum())
