"""The texts of misses and errors: what a user reads when a layer is not rewritten."""

from collections.abc import Callable

import pytest
import torch

from hqc.errors import PassError, PlanError
from hqc.ops import sylvester
from hqc.passes import (
    AttachLora,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    PackInt4,
    RotateWeights,
    SelectLayers,
    SplitDigits,
)
from hqc.pipeline import Pass, run_pass, run_pipeline
from hqc.plan import QuantPlan
from hqc.program import Program, copy_graph, is_op
from hqc.site_rules import SiteRule

GRID = (0.0, 500.0)


def test_layers_that_cannot_be_quantised(captured: Callable[[str], Program]) -> None:
    findings = SelectLayers().find(captured("awkward"))
    assert findings.matches == ("fine",)
    assert dict(findings.misses) == {
        "grouped": "grouped convolution (4 groups): the rotation would mix groups",
        "conv2d_2": "a convolution with padding given as text is not rewritten",
        "conv_transpose2d": "transposed convolutions are not rewritten",
        "conv1d": "conv1d is not rewritten",
        "across": "the first axis of its input [64, 'N', 32] is not the batch: a scale per sample cannot be applied",
        "linear_1": "its weight is not a parameter",
        "twice": "the first axis of its input ['2*N', 64, 32] is not the batch: a scale per sample cannot be applied",
    }


def test_layers_whose_channels_have_no_block(captured: Callable[[str], Program]) -> None:
    program = run_pass(captured("odd_channels"), SelectLayers())
    findings = InsertHadamard(block=32).find(program)
    assert findings.matches == ("sixteen", "eight")
    assert findings.misses == (
        ("none", "12 input channels: no power of two from 8 to 32 divides them"),
        ("three", "3 input channels: no power of two from 8 to 32 divides them"),
    )
    plan = run_pass(program, InsertHadamard(block=32)).plan
    assert [p.block for p in plan.sites] == [16, 8, 0, 0]
    assert plan["none"].reason == "unrotated: 12 input channels: no power of two from 8 to 32 divides them"
    assert all(p.quantised for p in plan.sites), "a site without a block is quantised all the same"


@pytest.mark.parametrize(("block", "expected"), [(8, [8, 8]), (16, [16, 16]), (64, [32, 16]), (128, [32, 16])])
def test_the_block_option_bounds_the_block(block: int, expected: list[int], captured: Callable[[str], Program]) -> None:
    plan = run_pipeline(captured("two_sites"), [SelectLayers(), InsertHadamard(block=block)], check_numerics=True).plan
    assert [p.block for p in plan.sites] == expected


def test_tokens_stay_unrotated_when_asked(captured: Callable[[str], Program]) -> None:
    program = run_pass(captured("two_sites"), SelectLayers())
    findings = InsertHadamard(tokens=False).find(program)
    assert findings.matches == ("conv",)
    assert findings.misses == (("head", "three-dimensional input: left unrotated as in the reference implementation"),)


def test_the_first_rotation_is_shared_by_readers_of_one_tensor(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("shared_input"), [SelectLayers(), InsertHadamard()])
    roles = [node.meta["role"] for node in program.graph.nodes if "hadamard" in str(node.target)]
    assert sorted(roles) == ["rotation", "rotation_back", "rotation_back", "rotation_back"]


def test_a_tensor_that_is_overwritten_is_not_shared(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("in_place"), [SelectLayers(), InsertHadamard()], check_numerics=True)
    roles = [node.meta["role"] for node in program.graph.nodes if "hadamard" in str(node.target)]
    assert sorted(roles) == ["rotation", "rotation", "rotation_back", "rotation_back"]


def test_rules_name_their_pattern(captured: Callable[[str], Program]) -> None:
    program = captured("cross_attention")
    findings = SelectLayers(rules="reference").find(program)
    reasons = dict(findings.misses)
    assert reasons["up_blocks.0.resnets.0.conv_shortcut"] == "rule '*conv_shortcut': shortcut or downsampler"
    assert reasons["down_blocks.0.downsamplers.0.conv"] == "rule '*downsamplers.*.conv': shortcut or downsampler"
    assert set(reasons) == {s for s, _ in program.sites() if s.endswith("conv_shortcut") or "downsamplers" in s}


@pytest.mark.parametrize(
    ("rules", "shortcut"), [("default", (8, 8)), ("reference", (None, None)), ("all", (4, 3))], ids=str
)
def test_rule_sets_decide_bits(
    rules: str, shortcut: tuple[int | None, int | None], captured: Callable[[str], Program]
) -> None:
    plan = run_pass(captured("cross_attention"), SelectLayers(bits="w4a3", rules=rules)).plan
    site = plan["up_blocks.0.resnets.0.conv_shortcut"]
    assert (site.weight_bits, site.activation_bits) == shortcut
    for edge in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"):
        assert (plan[edge].weight_bits, plan[edge].activation_bits) == (8, 8)
        assert plan[edge].reason.startswith("unrotated: ")
    body = plan["mid_block.resnets.0.conv1"]
    assert (body.weight_bits, body.activation_bits, body.reason) == (4, 3, "")


def test_keep_float_names_its_pattern(captured: Callable[[str], Program]) -> None:
    findings = SelectLayers(keep_float=("he*",)).find(captured("two_sites"))
    assert findings.matches == ("conv",)
    assert findings.misses == (("head", "rule 'he*': asked for"),)
    program = run_pipeline(
        captured("two_sites"), [SelectLayers(keep_float=("he*",)), InsertHadamard(), InsertQdq(GRID)]
    )
    integer = run_pipeline(program, [FreezeIntegers(), RotateWeights(), SplitDigits(), PackInt4()], check_numerics=True)
    assert dict(integer.history[-1].missed) == {"head": "float: rule 'he*': asked for"}
    assert "head.weight" in integer.state
    assert "conv.weight" not in integer.state


def test_everything_float_is_legal_and_changes_nothing(captured: Callable[[str], Program]) -> None:
    program = captured("two_sites")
    chain: list[Pass] = [SelectLayers(keep_float=("*",)), InsertHadamard(), InsertQdq(GRID), FreezeIntegers()]
    result = run_pipeline(program, [*chain, RotateWeights(), SplitDigits(), PackInt4()])
    args = program.example_inputs(2)
    assert torch.equal(result.module()(*args), program.module()(*args))


def test_a_keep_float_pattern_that_matches_nothing_is_an_error(captured: Callable[[str], Program]) -> None:
    with pytest.raises(PlanError, match=r"pattern 'to_x': matches no site\. Sites are named like conv, head\."):
        SelectLayers(keep_float=("to_x",)).find(captured("two_sites"))


def test_an_unknown_rule_set_is_an_error(captured: Callable[[str], Program]) -> None:
    with pytest.raises(PlanError, match=r"rules 'mine': unknown; there are default, reference, mixed, all"):
        SelectLayers(rules="mine").find(captured("two_sites"))


def test_selecting_again_after_a_rotation_is_refused(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("two_sites"), [SelectLayers(), InsertHadamard()])
    with pytest.raises(PassError, match=r"select_layers: conv is rotated already\. Run it before insert_hadamard\."):
        run_pass(program, SelectLayers())


def test_freezing_with_a_lora_left_is_refused(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("two_sites"), [SelectLayers(), InsertQdq(GRID), AttachLora()])
    with pytest.raises(PassError, match=r"freeze_integers: conv still has a LoRA\. Run merge_lora first\."):
        run_pass(program, FreezeIntegers())


def test_a_program_without_a_timestep_is_refused(captured: Callable[[str], Program]) -> None:
    program = run_pass(captured("two_sites"), SelectLayers())
    graph = program.module().graph
    for node in graph.nodes:
        if node.op == "placeholder" and node.name == "timestep":
            node.name = node.target = "moment"
    inputs = (program.inputs[0], type(program.inputs[1])("moment", ("N",)))
    with pytest.raises(PassError, match="the inputs are sample, moment; expected one named timestep"):
        run_pass(program.evolve(graph=graph, inputs=inputs), InsertQdq(GRID))


@pytest.mark.parametrize("one", [RotateWeights(), SplitDigits()], ids=["rotate_weights", "split_digits"])
def test_passes_after_packing_are_refused(one: Pass, captured: Callable[[str], Program]) -> None:
    chain: list[Pass] = [SelectLayers(), InsertQdq(GRID), FreezeIntegers()]
    chain += [] if isinstance(one, RotateWeights) else [RotateWeights()]
    program = run_pipeline(captured("two_sites"), [*chain, PackInt4()])
    with pytest.raises(PassError, match=r"conv: its codes are packed already\. Run pack_int4 after every other pass\."):
        run_pass(program, one)


def test_accumulators_past_int32_stay_in_floating_point(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("two_sites"), [SelectLayers(bits="w8a8"), InsertQdq(GRID), FreezeIntegers()])
    # No layer of a denoiser is that wide, so the codes of one are replaced by ones that do overflow.
    wide = torch.full((16, 16_384 * 32, 3, 3), 127, dtype=torch.int8)
    findings = RotateWeights().find(program.evolve(state={**program.state, "conv.weight_codes": wide[:1, :15_000]}))
    assert findings.matches == ("head",)
    bound = 15_000 * 9 * 127 * 127
    assert bound >= 2**31
    assert findings.misses == (("conv", f"accumulators reach {bound}, past int32"),)


def test_codes_past_two_digits_are_refused(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(
        captured("two_sites"),
        [SelectLayers(bits="w8a8"), InsertHadamard(), InsertQdq(GRID), FreezeIntegers(), RotateWeights()],
    )
    # Codes that follow the signs of one row of H_128 add up to 64·127 + 64·128 = 16 320: one more than two digits hold.
    signs = sylvester(128)[1]
    codes = torch.where(signs > 0, 127, -128).to(torch.int8)[None, :, None, None].expand(16, 128, 3, 3)
    with pytest.raises(PassError, match=r"split_digits at conv: rotated codes span -?\d+…16320, past two digits"):
        SplitDigits().find(with_conv_codes(program, codes, 128))


def with_conv_codes(program: Program, codes: torch.Tensor, *rotation: int) -> Program:
    """Other codes at `conv`, rotated by (order, regular) when they are multiplied."""
    graph = copy_graph(program.graph)
    for node in graph.nodes:
        if is_op(node, torch.ops.hqc.rotate_codes.default) and node.meta["site"] == "conv":
            node.args = (node.args[0], *rotation)
    return program.evolve(graph=graph, state={**program.state, "conv.weight_codes": codes})


@pytest.mark.parametrize("block", [-8, 4, 24, 256, "32"])
def test_a_block_that_is_none_is_an_error(block: object) -> None:
    with pytest.raises(PlanError, match="expected 8, 16, 32, 64 or 128"):
        InsertHadamard(block=block)  # type: ignore[arg-type]


@pytest.mark.parametrize("timesteps", [(1.0, 1.0), (1, 1.0)], ids=str)
def test_a_grid_that_repeats_is_an_error(timesteps: tuple[float, ...]) -> None:
    with pytest.raises(PlanError, match="the grid repeats a timestep"):
        InsertQdq(timesteps)


@pytest.mark.parametrize("timesteps", [(float("nan"),), (float("inf"), 1.0), ("1",)], ids=str)
def test_a_grid_that_is_not_all_numbers_is_an_error(timesteps: tuple[float, ...]) -> None:
    with pytest.raises(PlanError, match="is not all numbers"):
        InsertQdq(timesteps)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_an_error(rank: int) -> None:
    with pytest.raises(PlanError, match=f"rank {rank}: a LoRA needs a rank of at least 1"):
        AttachLora(rank=rank)


def test_bits_and_the_grid_come_from_the_plan_unless_they_are_given(captured: Callable[[str], Program]) -> None:
    asked = captured("two_sites").evolve(plan=QuantPlan(bits="w3a5", timesteps=(1.0, 2.0), keep_float=("head",)))
    plan = run_pipeline(asked, [SelectLayers(), InsertQdq()]).plan
    assert (plan.bits, plan.timesteps, plan.keep_float) == ("w3a5", (1.0, 2.0), ("head",))
    assert [(p.site, p.weight_bits, p.activation_bits) for p in plan.quantised] == [("conv", 3, 5)]
    given = run_pipeline(asked, [SelectLayers(bits="w8a8"), InsertQdq((7.0,))]).plan
    assert (given.bits, given.timesteps) == ("w8a8", (7.0,))
    nothing = run_pipeline(captured("two_sites"), [SelectLayers(), InsertQdq()]).plan
    assert (nothing.bits, nothing.timesteps) == ("w4a4", (0.0,))


@pytest.mark.parametrize("bits", ["w1a4", "w4a9", "4", "w4", "w4a4x", " ", "wa", "w4a-3", "w04a44"])
def test_bits_that_are_none_are_an_error(bits: str, captured: Callable[[str], Program]) -> None:
    with pytest.raises(PlanError, match=r"expected wNaM with N and M in 2…8"):
        run_pass(captured("two_sites"), SelectLayers(bits=bits))


def test_lora_leaves_the_8_bit_edges_alone(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("unconditional"), [SelectLayers(), InsertHadamard(), InsertQdq(GRID)])
    findings = AttachLora().find(program)
    assert dict(findings.misses)["conv_in"] == "8-bit edge layer: not trained"
    assert "conv_in" not in findings.matches
    with_lora = run_pass(program, AttachLora(rank=4))
    assert set(AttachLora().find(with_lora).misses) >= {(s, "has a LoRA already") for s in findings.matches}


def test_each_site_draws_its_own_lora(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("shared_input"), [SelectLayers(), InsertQdq(GRID)])
    one, other, again = (run_pass(program, AttachLora(rank=4, seed=seed)).state for seed in (0, 1, 0))
    assert torch.equal(one["to_q.lora_a"], again["to_q.lora_a"])
    assert not torch.equal(one["to_q.lora_a"], other["to_q.lora_a"])
    assert not torch.equal(one["to_q.lora_a"], one["to_k.lora_a"])
    assert float(one["to_q.lora_a"].abs().max()) <= 1 / 32**0.5
    assert float(one["to_q.lora_b"].abs().max()) == 0


def test_the_rank_is_bounded_by_the_weight(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("two_sites"), [SelectLayers(), InsertQdq(GRID), AttachLora(rank=64)])
    assert [p.lora_rank for p in program.plan.sites] == [16, 5]
    said = "more than 2 layers have, which get the most they can: conv 16, head 5"
    assert program.history[-1].missed == (("rank 64", said),)


def test_a_rank_of_the_plan_is_nothing_to_say(captured: Callable[[str], Program]) -> None:
    rules = (SiteRule("conv", lora_rank=2), SiteRule("head", lora_rank=2))
    asked = captured("two_sites").evolve(plan=QuantPlan(rules=rules))
    program = run_pipeline(asked, [SelectLayers(), InsertQdq(GRID), AttachLora(rank=64)])
    assert [p.lora_rank for p in program.plan.sites] == [2, 2]
    assert program.history[-1].missed == ()
