"""Asymmetric ranges through the whole chain, against numpy int64 with unsigned codes and explicit zero points."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hqc.bounds import bounds_of
from hqc.errors import PlanError
from hqc.passes import (
    PASSES,
    AttachLora,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    MergeLora,
    PackInt4,
    RotateWeights,
    SelectLayers,
    SplitDigits,
)
from hqc.passes.insert_qdq import spanning_weight_range
from hqc.pipeline import format_pipeline, parse_pipeline, run_pipeline
from hqc.program import Program
from hqc.sites import quantised_sites
from hqc.storage import load_program, save_program
from hqc.structure import site_problems

GRID = (0.0, 300.0, 600.0, 900.0)
INTEGER = (MergeLora(), FreezeIntegers(), RotateWeights(), SplitDigits(), PackInt4())


def quantised(
    captured: Callable[[str], Program],
    model: str,
    bits: str,
    *,
    activation: str = "asymmetric",
    weight: str = "asymmetric",
    block: int = 32,
) -> Program:
    """Up to fake quantisation with a LoRA; scales, zero points and LoRAs fixed random values."""
    rotation = [InsertHadamard(block=block)] if block else []
    insert = InsertQdq(GRID, activation=activation, weight=weight)
    program = run_pipeline(captured(model), [SelectLayers(bits=bits), *rotation, insert, AttachLora(rank=3)])
    generator, state = torch.Generator().manual_seed(1), dict(program.state)
    levels = 2 ** int(bits[3]) - 1
    for name, tensor in state.items():
        if name.endswith("scale_table"):
            state[name] = (3.0 + 2 * torch.rand(tensor.shape, generator=generator)) / levels
        if name.endswith("zero_table"):
            state[name] = levels * torch.rand(tensor.shape, generator=generator)
        if name.endswith("lora_b"):
            state[name] = 0.05 * torch.randn(tensor.shape, generator=generator)
    return program.evolve(state=state)


# ---- the oracle ----------------------------------------------------------------------------------------------------


def unsigned(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """q = clip(round(x/s) + z, 0, 2ⁿ-1), the first axis the scale's."""
    shape = (-1, *[1] * (x.ndim - 1))
    levels = np.rint(x.astype(np.float32) * (np.float32(1) / scale).reshape(shape))
    return np.clip(levels + zero.reshape(shape), 0, 2**bits - 1).astype(np.int64)


def by_four_sums(q: np.ndarray, z: np.ndarray, w: np.ndarray, z_w: np.ndarray) -> np.ndarray:
    """Σ_k (q[m, k] - z[m])·(w[o, k] - z_w[o]) from unsigned codes, in int64."""
    cross = q @ w.T - q.sum(1)[:, None] * z_w[None] - z[:, None] * w.sum(1)[None]
    return cross + q.shape[1] * z[:, None] * z_w[None]


def oracle_conv(program: Program, x: np.ndarray, rows: list[int]) -> np.ndarray:
    """The unrotated 3×3 convolution of `two_sites`, padded by 1 with the code of real 0."""
    plan, state = program.plan["conv"], {name: tensor.numpy() for name, tensor in program.state.items()}
    scale, scale_w = state["conv.activation_scale_table"][rows], state["conv.weight_scale"]
    zero = np.clip(np.rint(state["conv.activation_zero_table"]), 0, 2**plan.activation_bits - 1)[rows].astype(np.int64)
    zero_w = state["conv.weight_zero"].astype(np.int64)
    weight = state["conv.weight"] + (program.state["conv.lora_b"] @ program.state["conv.lora_a"]).numpy().reshape(
        state["conv.weight"].shape
    )
    q, w = unsigned(x, scale, zero, plan.activation_bits), unsigned(weight, scale_w, zero_w, plan.weight_bits)
    n, channels, height, width = q.shape
    padded = np.empty((n, channels, height + 2, width + 2), np.int64)
    padded[:] = zero.reshape(-1, 1, 1, 1)
    padded[:, :, 1:-1, 1:-1] = q
    acc = np.zeros((n, len(w), height, width), np.int64)
    for y in range(height):
        for column in range(width):
            patch = padded[:, :, y : y + 3, column : column + 3].reshape(n, -1)
            acc[:, :, y, column] = by_four_sums(patch, zero, w.reshape(len(w), -1), zero_w)
    real = acc * scale_w.astype(np.float64).reshape(1, -1, 1, 1) * scale.astype(np.float64).reshape(-1, 1, 1, 1)
    return real + state["conv.bias"].reshape(1, -1, 1, 1)


@pytest.mark.parametrize("stage", ["quantised", "integer"])
@pytest.mark.parametrize("bits", ["w4a4", "w2a2", "w3a6", "w7a7"])
def test_a_padded_convolution_equals_explicit_zero_points(
    bits: str, stage: str, captured: Callable[[str], Program]
) -> None:
    program = quantised(captured, "two_sites", bits, block=0)
    sample, _ = program.example_inputs(4, seed=3)
    timestep = torch.tensor([0.0, 899.0, 310.0, 450.0])
    rows = [int(np.abs(np.float32(t) - np.float32(GRID)).argmin()) for t in timestep.tolist()]
    shifted = sample.numpy() + (timestep.numpy() / np.float32(1000)).reshape(-1, 1, 1, 1)
    wanted = oracle_conv(program, shifted, rows)
    ran = program if stage == "quantised" else run_pipeline(program, INTEGER)
    found = outputs_of(ran, "conv", sample, timestep).numpy()
    # Equal codes; float32 sums of 288 terms in the fake form, three roundings in the integer one.
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def outputs_of(program: Program, site: str, *args: torch.Tensor) -> torch.Tensor:
    """What a site's layer gives."""
    found = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n.meta.get("role") == "layer":
                found[n.meta["site"]] = value
            return value

    with torch.no_grad():
        Watch(program.module()).run(*args)
    return found[site]


@pytest.mark.parametrize(
    "ranges", [("asymmetric", "asymmetric"), ("asymmetric", "symmetric"), ("symmetric", "asymmetric")]
)
@pytest.mark.parametrize("model", ["two_sites", "geometry", "shared_weights", "shared_input", "odd_channels"])
def test_integer_equals_fake_quantised(model: str, ranges: tuple[str, str], captured: Callable[[str], Program]) -> None:
    program = quantised(captured, model, "w4a4", activation=ranges[0], weight=ranges[1])
    assert site_problems(program) == []
    lowered = program
    for one in INTEGER:
        lowered = run_pipeline(lowered, [one], check_numerics=True)
        assert site_problems(lowered) == []
    args = program.example_inputs(3)
    with torch.no_grad():
        fake, whole = program.module()(*args), lowered.module()(*args)
    assert (fake - whole).norm() <= 1e-5 * fake.norm()


@pytest.mark.parametrize("stage", ["quantised", "integer"])
def test_stored_and_loaded_it_is_the_same(stage: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = quantised(captured, "two_sites", "w4a4")
    program = program if stage == "quantised" else run_pipeline(program, INTEGER)
    save_program(program, tmp_path / "asymmetric.hqc")
    loaded = load_program(tmp_path / "asymmetric.hqc")
    assert loaded.plan == program.plan
    args = program.example_inputs(3)
    with torch.no_grad():
        assert torch.equal(loaded.module()(*args), program.module()(*args))


def test_zero_points_matter(captured: Callable[[str], Program]) -> None:
    program = quantised(captured, "two_sites", "w4a4")
    args = program.example_inputs(3)
    others = {n: t + 1 if n.endswith(("zero_table", "weight_zero")) else t for n, t in program.state.items()}
    with torch.no_grad():
        assert not torch.equal(program.module()(*args), program.evolve(state=others).module()(*args))


def test_a_mixed_batch_equals_one_by_one(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(quantised(captured, "two_sites", "w4a4"), INTEGER)
    sample, _ = program.example_inputs(4)
    timestep = torch.tensor([0.0, 310.0, 899.0, 450.0])
    module = program.module()
    with torch.no_grad():
        mixed = module(sample, timestep)
        single = torch.cat([module(sample[i : i + 1], timestep[i : i + 1]) for i in range(4)])
    assert (mixed - single).norm() <= 1e-6 * single.norm()


def test_eight_bits_stay_symmetric_and_the_plan_says_so(captured: Callable[[str], Program]) -> None:
    program = quantised(captured, "two_sites", "w4a8")
    plan = program.plan["conv"]
    assert (plan.weight_symmetric, plan.activation_symmetric) == (False, True)
    assert plan.reason == "activations symmetric: asymmetric codes of 8 bits do not fit int8"
    assert "conv.activation_zero_table" not in program.state
    assert site_problems(program) == []
    both = quantised(captured, "two_sites", "w8a8").plan["conv"]
    assert both.weight_symmetric
    assert both.reason == "activations and weights symmetric: asymmetric codes of 8 bits do not fit int8"


def test_symmetric_sites_are_what_they_were(captured: Callable[[str], Program]) -> None:
    passes = [SelectLayers(bits="w4a4"), InsertHadamard()]
    plain = run_pipeline(captured("two_sites"), [*passes, InsertQdq(GRID)])
    named = run_pipeline(captured("two_sites"), [*passes, InsertQdq(GRID, activation="symmetric", weight="symmetric")])
    assert str(plain.graph) == str(named.graph)
    assert all(torch.equal(tensor, named.state[name]) for name, tensor in plain.state.items())
    assert not any("zero" in name for name in plain.state)
    assert torch.ops.hqc.fake_quantize_bounded.default not in {node.target for node in plain.graph.nodes}


@pytest.mark.parametrize(("zero", "limit"), [(0.0, 64), (63.0, 127), (64.0, 127), (100.0, 64)])
def test_seven_asymmetric_bits_may_need_the_smaller_digit(
    zero: float, limit: int, captured: Callable[[str], Program]
) -> None:
    """Codes q - z of 7 bits reach 127 unless z lies in the middle: then two products could saturate x86's int16."""
    program = quantised(captured, "two_sites", "w4a7", weight="symmetric")
    state = {n: torch.full_like(t, zero) if n.endswith("zero_table") else t for n, t in program.state.items()}
    ready = run_pipeline(program.evolve(state=state), [MergeLora(), FreezeIntegers(), RotateWeights()])
    notes = dict(SplitDigits().find(ready).misses)
    if "conv" in notes:
        assert notes["conv"].endswith(f"of {limit}")
    peak = int(ready.state["conv.weight_codes"].abs().max())
    assert peak <= 8
    assert all(int(n.args[-1]) == max(zero, 127 - zero) for n in ready.graph.nodes if n.meta.get("role") == "product")
    assert (max(zero, 127 - zero) <= 64) == (limit == 127)


def test_accumulators_are_bounded_by_the_largest_code(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(quantised(captured, "two_sites", "w4a5"), [MergeLora(), FreezeIntegers(), RotateWeights()])
    for site in quantised_sites(program):
        assert int(site.products[0].node.args[-1]) == site.bounds.largest == bounds_of(site.quantiser, program).largest


def test_codes_past_four_bits_are_not_packed(captured: Callable[[str], Program]) -> None:
    program = quantised(captured, "two_sites", "w4a4")
    state = {**program.state, "conv.weight_zero": torch.zeros(16), "head.weight_zero": torch.full((5,), 8.0)}
    ready = run_pipeline(program.evolve(state=state), [MergeLora(), FreezeIntegers(), RotateWeights(), SplitDigits()])
    found = PackInt4().find(ready)
    assert found.matches == ("head",)
    largest = int(ready.state["conv.weight_codes"].max())
    assert largest > 7
    assert dict(found.misses)["conv"] == f"codes 0…{largest} do not fit in 4 bits"


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_the_first_weight_range_spans_the_values_and_zero(bits: int) -> None:
    weight = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0))
    weight[1] = weight[1].abs() + 1
    weight[2] = -weight[2].abs() - 1
    weight[3] = 0
    scale, zero = spanning_weight_range(weight, bits)
    top = 2**bits - 1
    for row in range(3):
        flat = weight[row].numpy().astype(np.float64).ravel()
        least, largest = min(flat.min(), 0), max(flat.max(), 0)
        assert float(scale[row]) == pytest.approx((largest - least) / top, rel=1e-6)
        assert float(zero[row]) == round(-least / float(scale[row]))
    assert zero[1] == 0
    assert zero[2] == top
    assert (scale[3], zero[3]) == (1, 0)


def test_a_range_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PlanError, match="weight 'skewed': unknown range; there are symmetric, asymmetric"):
        InsertQdq(weight="skewed")


def test_the_pass_prints_and_parses() -> None:
    one = InsertQdq((0.0, 500.0), activation="asymmetric")
    assert parse_pipeline(format_pipeline([one]), PASSES) == (one,)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv.activation_low_table", 1.0, "its activation's codes are not those of 4 bits"),
        ("conv.activation_high_table", -1.0, "its activation's codes are not those of 4 bits"),
        ("conv.activation_low_table", 0.5, "its activation's codes are not those of 4 bits"),
    ],
)
def test_stored_ranges_that_are_not_those_of_the_bits(
    name: str, value: float, message: str, captured: Callable[[str], Program]
) -> None:
    frozen = run_pipeline(quantised(captured, "two_sites", "w4a4"), [MergeLora(), FreezeIntegers()])
    state = {**frozen.state, name: torch.full_like(frozen.state[name], value)}
    assert any(message in text for text in site_problems(frozen.evolve(state=state)))


def test_a_plan_that_hides_a_range_is_found(captured: Callable[[str], Program]) -> None:
    program = quantised(captured, "two_sites", "w4a4")
    for field in ("activation_symmetric", "weight_symmetric"):
        plan = replace(program.plan["conv"], **{field: True})
        problems = site_problems(program.evolve(plan=program.plan.with_sites({"conv": plan})))
        assert any("codes are not those of 4 bits" in text for text in problems)
