"""Attention written out and quantised: torch's own attention in float64, plans, misses, what is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from attention_models import Attending, attending
from denoisers import captured_denoiser
from torch import Tensor, nn
from torch.nn import functional

from hqc.attention_plan import AttentionPlan
from hqc.attentions import written_out
from hqc.calibration import CalibrateWeights
from hqc.errors import PlanError
from hqc.export.reference import without_quantisers
from hqc.passes import FloatAttention, FreezeIntegers, InsertAttentionQdq, InsertQdq, OpenAttention, SelectLayers
from hqc.pipeline import run_pass, run_pipeline, run_procedure
from hqc.plan import QuantPlan
from hqc.program import Program, Stage, is_op
from hqc.sampling import Work
from hqc.storage import load_program, save_program
from hqc.structure import site_problems

GRID = (0.0, 500.0)
SDPA = torch.ops.aten.scaled_dot_product_attention.default
MODELS: dict[str, Callable[[], nn.Module]] = {
    "heads": Attending,
    "scale": partial(Attending, 0.3),
    "one": partial(Attending, 1.0),
    "mask": partial(Attending, masked=True),
}


def quantised(program: Program, one: InsertAttentionQdq, bits: str = "w4a4") -> Program:
    steps = [OpenAttention(), SelectLayers(bits=bits), InsertQdq(GRID), one]
    result = run_pipeline(program, steps)
    generator, state = torch.Generator().manual_seed(2), dict(result.state)
    for name, tensor in state.items():
        if name.endswith("scale_table"):
            state[name] = tensor * (0.2 + 0.3 * torch.rand(tensor.shape, generator=generator))
        if name.endswith("log2_table"):
            state[name] = torch.tensor([0.0, 1.0])
    return result.evolve(state=state)


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_torch_in_float64(name: str) -> None:
    program = attending(MODELS[name])
    opened = run_pass(program, OpenAttention(), check_numerics=True)
    assert not any(is_op(node, SDPA) for node in opened.graph.nodes)
    torch.manual_seed(12)
    model, args = MODELS[name]().double(), [x.double() for x in program.example_inputs(3)]
    wanted = model(*args)
    torch.testing.assert_close(opened.module().double()(*args), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run_pass(opened, FloatAttention()).module().double()(*args), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "sd3", "flux"])
def test_every_denoiser_opens_and_closes(name: str) -> None:
    program = captured_denoiser(name)
    opened = run_pass(program, OpenAttention(), check_numerics=True)
    count = sum(is_op(node, SDPA) for node in program.graph.nodes)
    assert len(opened.history[-1].touched) == count == len(list(written_out(opened)))
    assert site_problems(opened) == []
    closed = run_pass(opened, FloatAttention(), check_numerics=False)
    assert sum(is_op(node, SDPA) for node in closed.graph.nodes) == count
    args = program.example_inputs(2)
    torch.testing.assert_close(closed.module()(*args), program.module()(*args), rtol=1e-4, atol=1e-5)
    assert [n.name for n in closed.graph.nodes if is_op(n, SDPA)] == [
        n.name for n in program.graph.nodes if is_op(n, SDPA)
    ]


class _Odd(nn.Module):
    """Attentions that stay as they are, and one of plain tokens."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = sample + (timestep / 1000).view(-1, 1, 1)
        causal = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        chosen = functional.scaled_dot_product_attention(x, x, x, (x[..., :1] > 0).transpose(1, 2))
        return functional.scaled_dot_product_attention(x, causal, chosen)


def test_misses() -> None:
    assert OpenAttention().find(attending(_Odd)).misses == (
        ("scaled_dot_product_attention", "it is causal"),
        ("scaled_dot_product_attention_1", "its mask is of yes and no"),
    )
    opened = run_pass(attending(_Odd), OpenAttention(), check_numerics=True)
    assert opened.history[-1].touched == ("scaled_dot_product_attention_2",)
    planned = run_pipeline(opened, [SelectLayers(), InsertQdq(GRID)])
    assert InsertAttentionQdq().find(planned).misses == (
        ("scaled_dot_product_attention", "float: it is not written out"),
        ("scaled_dot_product_attention_1", "float: it is not written out"),
    )


@pytest.mark.parametrize("stage", [Stage.QUANTISED, Stage.INTEGER])
@pytest.mark.parametrize("operands", ["float", "symmetric", "asymmetric"])
@pytest.mark.parametrize("softmax_bits", [0, 4, 8])
def test_its_quantisers_are_those_of_a_computation_by_hand(operands: str, softmax_bits: int, stage: Stage) -> None:
    one = InsertAttentionQdq(softmax_bits, operands)  # type: ignore[arg-type]
    result = quantised(attending(partial(Attending, 0.3, masked=True)), one)
    if stage == Stage.INTEGER:
        result = run_pass(result, FreezeIntegers())
    assert site_problems(result) == []
    names = [n for n in result.state if "attention_" in n and n.endswith("activation_scale_table")]
    assert len(names) == (operands != "float") * 3 + (softmax_bits > 0)
    if not names:
        assert result.plan.attentions == ()
        assert any(is_op(node, SDPA) for node in result.graph.nodes)
        return
    args = result.example_inputs(4)
    found = dict[str, Tensor]()

    class Values(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            found[n.name] = super().run_node(n)
            return found[n.name]

    Values(result.module()).run(*args)
    (attention,) = written_out(result)
    row = (args[1][:, None] - torch.tensor(GRID)).abs().argmin(1)

    def table(part: str, kind: str) -> Tensor:
        return result.state[f"{attention.name}.attention_{part}.{kind}"][row].view(-1, 1, 1, 1)

    def operand(part: str, x: Tensor) -> Tensor:
        if operands == "float":
            return x
        scale = table(part, "activation_scale_table")
        low, high = (-7, 7) if operands == "symmetric" else (-8, 7)  # zero points start in the middle
        return (x / scale).round().clamp(low, high) * scale

    q, k, v = (found[node.name] for node in (attention.query, attention.key, attention.value))
    scores = operand("query", q * 0.3) @ operand("key", k).transpose(-2, -1) + found[attention.mask.name]  # type: ignore[union-attr]
    p = scores.softmax(-1)
    if softmax_bits:
        scale, top = table("softmax", "activation_scale_table"), 2**softmax_bits - 1
        even, powers = (p / scale).round().clamp(0, top) * scale, 2 ** -(-p.log2()).round().clamp(0, top)
        p = torch.where(table("softmax", "log2_table") > 0, powers, even)
    torch.testing.assert_close(found[attention.result.name], p @ operand("value", v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factors", ["powers of two", "any"])
def test_factors_that_cancel_between_float_q_and_k_change_no_code(factors: str) -> None:
    """PassionSR's Q/s, K·s: in the weights of q and k a factor of an output channel is one of its scale."""
    program, generator = attending(), torch.Generator().manual_seed(3)
    exponents = 4 * torch.rand(32, generator=generator) - 2
    s = torch.exp2(exponents.round() if factors == "powers of two" else exponents)
    state = dict(program.state)
    for layer, factor in (("to_q", s.reciprocal()), ("to_k", s)):
        state |= {
            f"{layer}.weight": state[f"{layer}.weight"] * factor[:, None],
            f"{layer}.bias": state[f"{layer}.bias"] * factor,
        }
    found = []
    for one in (program, program.evolve(state=state)):
        inserted = run_pipeline(one, [SelectLayers(bits="w4a4", rules="all"), InsertQdq(GRID)])
        found.append(run_pass(run_procedure(inserted, CalibrateWeights(), Work(one)), FreezeIntegers()))
    plain, scaled = found
    args = program.example_inputs(3)
    for layer in ("to_q", "to_k", "to_v", "to_out"):
        moved = plain.state[f"{layer}.weight_codes"] != scaled.state[f"{layer}.weight_codes"]
        assert int(moved.sum()) <= (0 if factors == "powers of two" else 1), layer  # a rounding boundary
    torch.testing.assert_close(plain.module()(*args), scaled.module()(*args), rtol=1e-4, atol=1e-4)


def test_a_plan_says_what_is_quantised(tmp_path: object) -> None:
    result = quantised(attending(), InsertAttentionQdq(4, "asymmetric"), "w4a5")
    (plan,) = result.plan.attentions
    assert str(plan) == "q, k and v a5*, softmax a4"
    assert QuantPlan.from_dict(result.plan.to_dict()) == result.plan
    save_program(result, f"{tmp_path}/x.hqc")
    loaded = load_program(f"{tmp_path}/x.hqc")
    assert loaded.plan == result.plan
    args = result.example_inputs(2)
    assert torch.equal(loaded.module()(*args), result.module()(*args))
    wide = quantised(attending(), InsertAttentionQdq(0, "asymmetric"), "w8a8")
    assert str(wide.plan.attentions[0]) == "q, k and v a8, softmax float"
    assert "attentions" not in attending().plan.to_dict()
    plain = without_quantisers(result)
    assert plain is not None
    wanted = attending().module()(*args)
    torch.testing.assert_close(plain.module()(*args), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"name": 3}, "field of the wrong type"),
        ({"name": "a", "softmax_bits": 9}, "has 9 bits"),
        ({"name": "a", "operand_bits": True}, "has True bits"),
        ({"name": "a", "operand_bits": 8, "operands_symmetric": False}, "asymmetric range of 8 bits"),
        ({"name": "a", "else": 8}, "unexpected keyword"),
    ],
)
def test_plans_that_make_no_sense_are_refused(data: dict[str, object], found: str) -> None:
    with pytest.raises(PlanError, match=found):
        QuantPlan.from_dict({**QuantPlan().to_dict(), "attentions": [data]})


def test_what_does_not_fit_is_found() -> None:
    """Of a program from elsewhere."""
    result = quantised(attending(), InsertAttentionQdq(4, "symmetric"))
    (plan,) = result.plan.attentions
    part = f"{plan.name}.attention"

    def planned(*plans: AttentionPlan) -> Program:
        return result.evolve(plan=replace(result.plan, attentions=plans))

    for program, found in (
        (planned(), "the plan and the graph do not agree about its query"),
        (planned(replace(plan, softmax_bits=None)), "do not agree about its softmax"),
        (planned(replace(plan, softmax_bits=8)), "its softmax has codes that are not those of 8 bits"),
        (planned(replace(plan, operand_bits=5)), "its query has codes that are not those of 5 bits"),
        (planned(replace(plan, operands_symmetric=False)), "its query has no activation_zero_table"),
        (planned(plan, plan), "two plans are for"),
        (planned(plan, AttentionPlan("other", 8)), "names the attention other, which the graph lacks"),
    ):
        assert any(found in text for text in site_problems(program)), found
    state = {name: t for name, t in result.state.items() if name != f"{part}_softmax.log2_table"}
    assert any("its softmax has no log2_table" in text for text in site_problems(result.evolve(state=state)))


def test_other_options_are_refused() -> None:
    with pytest.raises(PlanError, match=r"softmax_bits is 1. Give 2 to 8, or 0 for a float softmax"):
        InsertAttentionQdq(softmax_bits=1)


def test_a_model_without_attention_goes_on(captured: Callable[[str], Program]) -> None:
    program = captured("without_attention")
    steps = [OpenAttention(), SelectLayers(), InsertQdq(GRID), InsertAttentionQdq()]
    result = run_pipeline(program, steps)
    assert result.history[0].missed == result.history[-1].missed == (("attention", "the model has none"),)
    assert result.plan.attentions == ()
