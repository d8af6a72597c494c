"""Kinds of rotations through the passes: what is inserted, what is kept, and the integers against numpy int64."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from hqc.errors import PassError, PlanError
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
from hqc.pipeline import Pass, format_pipeline, parse_pipeline, run_pass, run_pipeline
from hqc.program import Program, copy_graph, is_op
from hqc.sites import rotation_of, rotation_within

GRID = (0.0, 500.0)
ops = torch.ops.hqc
PAIRS = [("sylvester", 8), ("sylvester", 128), *(("regular", order) for order in (16, 32, 64, 256))]
INTEGER = (MergeLora(), FreezeIntegers(), RotateWeights(), SplitDigits(), PackInt4())

# Both sides use the same codes; they differ by float32 sums of at most 2 304 terms and by one rounding of a scale.
TOLERANCE = 1e-5


@pytest.mark.parametrize("weights", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(("kind", "order"), PAIRS)
def test_nothing_changes_until_it_is_quantised(
    kind: str, order: int, weights: bool, captured: Callable[[str], Program]
) -> None:
    chain = [SelectLayers(), InsertHadamard(order, kind=kind, weights=weights)]
    program = run_pipeline(captured("wide_channels"), chain, check_numerics=True)
    conv = program.plan["conv"]
    assert (conv.block, conv.rotation, conv.weight_rotated) == (order, kind, weights)
    nodes = [node for node in program.graph.nodes if is_op(node, ops.hadamard.default)]
    assert {rotation_of(node).kind for node in nodes} == {kind}
    assert ("rotation_back" in {node.meta["role"] for node in nodes}) is not weights
    changed = (
        program.state[f"conv.weight{'_rotated' if weights else ''}"] - captured("wide_channels").state["conv.weight"]
    )
    assert (float(changed.abs().max()) > 0.01) is weights


@pytest.mark.parametrize(("order", "expected"), [(256, [256, 64, 64, 32]), (64, [64, 64, 64, 32]), (16, [16] * 4)])
def test_regular_orders_fall_back(order: int, expected: list[int], captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("wide_channels"), [SelectLayers(), InsertHadamard(order, kind="regular")])
    assert [plan.block for plan in program.plan.sites] == expected


def test_channels_that_no_regular_order_divides_say_so(captured: Callable[[str], Program]) -> None:
    plan = run_pipeline(captured("odd_channels"), [SelectLayers(), InsertHadamard(64, kind="regular")]).plan
    assert [site.block for site in plan.sites] == [16, 0, 0, 0]
    assert plan["eight"].reason == "unrotated: 40 input channels: none of the regular orders 16, 32, 64 divides them"


@pytest.mark.parametrize("weights", [False, True], ids=["single", "double"])
def test_readers_share_the_first_rotation_of_one_kind_and_order(
    weights: bool, captured: Callable[[str], Program]
) -> None:
    def firsts(*sites: tuple[str, str, int]) -> int:
        one = InsertHadamard(64, kind="regular", weights=weights, sites=sites)
        program = run_pipeline(captured("wide_channels"), [SelectLayers(), one], check_numerics=True)
        return [node.meta.get("role") for node in program.graph.nodes].count("rotation")

    assert firsts() == 3, "conv, left and right together, head"
    assert firsts(("right", "regular", 64)) == 3
    assert firsts(("right", "sylvester", 64)) == 4
    assert firsts(("right", "regular", 16)) == 4
    assert firsts(("right", "regular", 0)) == 3


def test_single_sites_have_their_own(captured: Callable[[str], Program]) -> None:
    sites = (("conv", "regular", 256), ("left", "sylvester", 8), ("head", "regular", 0))
    one = InsertHadamard(32, tokens=False, sites=sites)
    plan = run_pipeline(captured("wide_channels"), [SelectLayers(), one], check_numerics=True).plan
    assert [str(site.hadamard) for site in plan.sites] == ["regular H256", "H8", "None", "None"]
    assert plan["head"].reason == "unrotated: asked for"
    assert plan["right"].reason.startswith("unrotated: three-dimensional input")


def test_choices_survive_as_text() -> None:
    one = InsertHadamard(64, kind="regular", weights=True, sites=(("a.b", "sylvester", 0),))
    text = format_pipeline([one])
    assert text == "insert_hadamard(block=64, kind='regular', weights=True, sites=(('a.b', 'sylvester', 0),))"
    assert parse_pipeline(text, PASSES) == (one,)
    assert parse_pipeline("insert_hadamard(sites=[['a', 'regular', 16]])", PASSES) == (
        InsertHadamard(sites=(("a", "regular", 16),)),
    )


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "order of the other kind": ({"block": 256}, r"block 256: expected 8, 16, 32, 64 or 128 for a sylvester rotation"),
    "order of neither": ({"block": 8, "kind": "regular"}, r"expected 16, 32, 64 or 256 for a regular rotation \(8, 16"),
    "kind": ({"kind": "random"}, r"rotation kind 'random': unknown; there are sylvester, regular"),
    "choice's kind": ({"sites": (("a", "random", 8),)}, r"rotation kind 'random': unknown"),
    "choice's order": ({"sites": (("a", "regular", 8),)}, r"block 8: expected 16, 32, 64 or 256"),
    "no choice": ({"sites": (("a", "regular"),)}, r"\('a', 'regular'\)\" is no choice|is no choice"),
    "twice": ({"sites": (("a", "regular", 16), ("a", "regular", 0))}, r"insert_hadamard: a: stands there twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_there_is_not_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        InsertHadamard(**options)


@pytest.mark.parametrize(
    ("model", "sites", "message"),
    [
        (
            "two_sites",
            (("body", "regular", 16),),
            r"insert_hadamard: body: no such site\. Sites are named like conv, head",
        ),
        (
            "two_sites",
            (("head", "regular", 64),),
            r"head: regular of order 64 cannot be had: 16 input channels: none of",
        ),
        (
            "odd_channels",
            (("sixteen", "regular", 64),),
            r"sixteen: regular of order 64 cannot be had: 48 input channels",
        ),
        (
            "cross_attention",
            (("conv_in", "regular", 16),),
            r"conv_in: .* cannot be had: unrotated: first or last layer",
        ),
    ],
)
def test_a_choice_that_cannot_be_followed_is_refused(
    model: str, sites: tuple[tuple[str, str, int], ...], message: str, captured: Callable[[str], Program]
) -> None:
    program = run_pass(captured(model), SelectLayers())
    with pytest.raises(PlanError, match=message):
        InsertHadamard(sites=sites).find(program)


# ---- integers --------------------------------------------------------------------------------------------------------


def quantised(program: Program, bits: str, one: Pass) -> Program:
    """Fake-quantised with a LoRA; tables and LoRAs filled with fixed random values."""
    program = run_pipeline(program, [SelectLayers(bits=bits), one, InsertQdq(GRID), AttachLora(rank=3)])
    generator, state = torch.Generator().manual_seed(1), dict(program.state)
    top = 2 ** (int(bits[3]) - 1) - 1
    for name, tensor in state.items():
        if name.endswith("scale_table"):
            state[name] = (1.5 + torch.rand(tensor.shape, generator=generator)) / top
        if name.endswith("lora_b"):
            state[name] = 0.05 * torch.randn(tensor.shape, generator=generator)
    return program.evolve(state=state)


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.parametrize("weights", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("order", [16, 32, 64, 256])
def test_integers_equal_the_fake_quantised_program(
    order: int, weights: bool, bits: str, captured: Callable[[str], Program]
) -> None:
    program = quantised(captured("wide_channels"), bits, InsertHadamard(order, kind="regular", weights=weights))
    lowered = run_pipeline(program, INTEGER, check_numerics=True)
    found = {node.meta["site"]: rotation_within(node.args[1]) for node in products(lowered)}
    assert found == {site.site: None if weights else site.hadamard for site in program.plan.sites}
    args = program.example_inputs(3)
    with torch.no_grad():
        fake, whole = program.module()(*args), lowered.module()(*args)
    assert (fake - whole).norm() <= TOLERANCE * fake.norm()


def products(program: Program) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if is_op(node, ops.int_conv2d.default, ops.int_linear.default)]


def test_a_rotated_weight_needs_one_digit(captured: Callable[[str], Program]) -> None:
    one = InsertHadamard(256, kind="regular", weights=True)
    lowered = run_pipeline(quantised(captured("wide_channels"), "w7a7", one), INTEGER)
    assert lowered.history[-2].touched == ()
    assert len(products(lowered)) == 4


def matrix(order: int) -> np.ndarray:
    """By the parity of the bits of e = i ⊕ j: order 64 and 256 are powers of four."""
    e = np.arange(order)[:, None] ^ np.arange(order)[None]
    odd = np.bitwise_count((e & (e >> 1) & 0x55).astype(np.uint8)) & 1
    return 1 - 2 * odd.astype(np.int64)


@pytest.mark.parametrize("weights", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("order", [64, 256])
def test_a_strided_padded_convolution_equals_int64(
    order: int, weights: bool, captured: Callable[[str], Program]
) -> None:
    """Codes, weight codes and rotation by definition; the accumulators of the integer program are these numbers."""
    program = quantised(captured("wide_channels"), "w4a4", InsertHadamard(order, kind="regular", weights=weights))
    lowered = run_pipeline(program, [MergeLora(), FreezeIntegers(), RotateWeights(), SplitDigits()])
    values = Recorder(lowered.module())
    values.run(*program.example_inputs(2))
    product = products(lowered)[0]
    codes = values.seen[product.args[0].name].numpy().astype(np.int64)
    w = lowered.state["conv.weight_codes"].numpy().astype(np.int64)
    if not weights:
        blocks = w.reshape(64, 256 // order, order, 3, 3)
        w = np.einsum("ij,ogjyx->ogiyx", matrix(order), blocks).reshape(w.shape)
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    wanted = np.zeros((2, 64, 2, 2), dtype=np.int64)
    for y in range(2):
        for x in range(2):
            patch = padded[:, :, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
            wanted[:, :, y, x] = np.einsum("nchw,ochw->no", patch, w)
    accumulator = next(n for n in lowered.graph.nodes if n.meta.get("site") == "conv" and n.meta.get("role") == "layer")
    assert np.array_equal(values.seen[accumulator.args[0].name].numpy(), wanted)


class Recorder(torch.fx.Interpreter):
    """Every value by its node's name."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        with torch.no_grad():
            self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


def test_order_256_at_eight_bits_may_pass_two_digits(captured: Callable[[str], Program]) -> None:
    one = InsertHadamard(256, kind="regular")
    program = run_pipeline(
        captured("wide_channels"), [SelectLayers(bits="w8a8"), one, InsertQdq(GRID), FreezeIntegers(), RotateWeights()]
    )
    signs = torch.from_numpy(matrix(256)[0])
    codes = torch.where(signs > 0, 127, -128).to(torch.int8)[None, :, None, None].expand(64, 256, 3, 3)
    changed = program.evolve(state={**program.state, "conv.weight_codes": codes.contiguous()})
    message = (
        r"split_digits at conv: rotated codes span -?\d+…32632, past two digits .* Use a block of 64 or less, or rotate"
    )
    with pytest.raises(PassError, match=message):
        SplitDigits().find(changed)


def test_a_graph_of_three_arguments_is_sylvesters(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("two_sites"), [SelectLayers(), InsertHadamard()])
    nodes = [node for node in copy_graph(program.graph).nodes if is_op(node, ops.hadamard.default)]
    assert {len(node.args) for node in nodes} == {3}
    assert {str(rotation_of(node)) for node in nodes} == {"H32", "H16"}
