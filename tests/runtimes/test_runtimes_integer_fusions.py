"""Fusions of the GPU runtime's graph, kernels in plain torch: where they apply, and that they change no number."""

import json
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from denoisers import captured_denoiser
from fusion_models import MODELS, model
from integer_programs import quantised, relative
from torch import fx
from torch.nn import functional

from hqc.ops import hadamard
from hqc.passes import InsertHadamard
from hqc.program import Program, aten, is_op
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.fusions import FUSIONS, wide_attention
from hqc.runtimes.integer.fusions.wide_attention import WideAttention
from hqc.runtimes.integer.kernel_set import reference_kernels
from hqc.runtimes.integer.layers import Codes, GroupNormQuantise, IntegerLayer, KernelCall, LayerNormQuantise, Quantise

CPU = torch.device("cpu")


def built(program: Program, dtype: torch.dtype = torch.float32, *, fuse: bool = True) -> fx.GraphModule:
    return integer_module(program, reference_kernels(), BuildOptions(CPU, dtype, fuse=fuse))


def sites(module: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """Fusion -> sites, of those that apply anywhere."""
    return {record.name: record.sites for record in module.meta["report"].fusions if record.sites}


def modules(module: fx.GraphModule, kind: type) -> list:
    return [m for m in module.modules() if isinstance(m, kind)]


_VIEWS = (aten.slice.Tensor, aten.select.int, aten.reshape.default, aten.permute.default, aten.transpose.int)


def work(module: fx.GraphModule) -> int:
    """Kernels and operators that compute or copy."""
    called = dict(module.named_modules())
    kernels = sum(isinstance(called.get(str(n.target)), KernelCall) for n in module.graph.nodes)
    operators = [n.target for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return kernels + sum(target not in _VIEWS for target in operators)


# ---- one pattern each ----------------------------------------------------------------------------------------------

FUSED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "three_products": {"merge_products": ("to_q",)},
    "another_form": {"merge_products": ("to_q",)},
    "upsampled": {"sink_upsample": ("up",), "codes_from_products": ("up",)},
    "shift_of_image": {"take_in_shift": ("conv",), "codes_from_products": ("last",)},
    "shift_of_tokens": {"take_in_shift": ("linear",)},
    "norm_alone": {"quantise_group_norm": ("last",), "statistics_from_products": ("last",)},
    "norm_read_by_two": {"quantise_group_norm": ("left",), "statistics_from_products": ("left",)},
    "norm_kept": {"quantise_group_norm": ("last",), "statistics_from_products": ("last",)},
    "norm_of_float": {"quantise_group_norm": ("last",)},
    "skip": {
        "quantise_group_norm": ("last",),
        "read_both": ("shortcut",),
        "quantise_beside": ("shortcut",),
        "statistics_from_products": ("last", "last"),
    },
    "beside_before": {"quantise_group_norm": ("last",), "statistics_from_products": ("last",)},
    "rows_normed": {"quantise_layer_norm": ("last",)},
    "rows_normed_and_kept": {"quantise_layer_norm": ("last",)},
    "gated": {"quantise_gate": ("last",), "gate_in_product": ("last",)},
    "activated": {"quantise_gate": ("last",)},
    "gate_of_floats": {"quantise_gate": ("last",)},
    "gate_behind_residual": {"quantise_gate": ("last",)},
    "chain": {"codes_from_products": ("second", "last")},
    "one_wide_head": {"merge_products": ("to_q",), "take_wide_attention": ("to_out",)},
    "two_wide_heads": {"merge_products": ("to_q",), "take_wide_attention": ("to_out",)},
    "narrow_heads": {"merge_products": ("to_q",)},
    "wide_head_with_a_mask": {"merge_products": ("to_q",)},
    "wide_head_read_before_it_is_joined": {"merge_products": ("to_q",)},
}
"""The others stay as they are, but for `norm_before_float`, whose norm has no site."""


@pytest.mark.parametrize("name", MODELS)
def test_a_fusion_changes_no_number(name: str) -> None:
    """In float32 the same operations on the same numbers, in fewer kernels; in half precision no worse than without."""
    original = model(name)
    program = quantised(original, "w4a4")
    inputs = program.example_inputs(3, seed=7)
    reference = integer_form(program).module()(*inputs)
    quantisation = relative(reference, original.module()(*inputs))
    assert quantisation > 0.01
    plain, fused = built(program, fuse=False), built(program)
    assert plain.meta["report"].fusions == ()
    if name != "norm_before_float":
        assert sites(fused) == FUSED.get(name, {})
    assert torch.equal(fused(*inputs), plain(*inputs))
    assert relative(plain(*inputs), reference) <= max(0.1 * quantisation, 1e-6)
    assert (work(fused) < work(plain)) == bool(sites(fused))
    half = built(program, torch.float16)(*inputs)
    # Half precision may move codes by a step: a quarter of the quantisation error.
    assert relative(half, reference) <= 0.25 * quantisation


@pytest.mark.parametrize("weights", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("name", MODELS)
def test_a_fusion_keeps_a_regular_rotation(name: str, weights: bool) -> None:
    """With weights packed too: every kernel that takes a rotation in is told its kind."""
    rotation = InsertHadamard(16, kind="regular", weights=weights)
    program = quantised(model(name), "w4a4", rotation=rotation)
    inputs = program.example_inputs(3, seed=7)
    reference = integer_form(program).module()(*inputs)
    quantisation = relative(reference, model(name).module()(*inputs))
    options = BuildOptions(CPU, torch.float32, pack=True)
    plain, fused = built(program, fuse=False), integer_module(program, reference_kernels(), options)
    assert bool(sites(fused)) == (name in FUSED or name == "norm_before_float")
    assert torch.equal(fused(*inputs), plain(*inputs))
    assert relative(plain(*inputs), reference) <= max(0.1 * quantisation, 1e-6)
    codes = modules(fused, Codes)
    assert all((how.block, how.regular) in ((16, True), (1, False)) for how in codes)
    assert any(how.regular for how in codes)


def test_every_fusion_has_a_model() -> None:
    applied = {fusion for found in FUSED.values() for fusion in found}
    assert applied == {fusion.name for fusion in FUSIONS}


def test_a_norm_that_somebody_else_reads_gives_both() -> None:
    """Codes for the convolutions and floats for the rest; two convolutions that share a quantiser need codes alone."""
    for name, kind in (("norm_kept", GroupNormQuantise), ("rows_normed_and_kept", LayerNormQuantise)):
        (norm,) = modules(built(quantised(model(name), "w4a4")), kind)
        assert norm.keep
    shared = built(quantised(model("norm_read_by_two"), "w4a4"))
    (norm,) = modules(shared, GroupNormQuantise)
    assert (norm.keep, norm.silu, len(modules(shared, Quantise))) == (False, False, 1)
    # With a quantiser each, the first goes into the norm and the second reads its floats.
    program = quantised(model("norm_read_by_two"), "w4a4", shared=False)
    apart, inputs = built(program), program.example_inputs(2, seed=1)
    (norm,) = modules(apart, GroupNormQuantise)
    assert (norm.keep, len(modules(apart, Quantise))) == (True, 2)
    assert torch.equal(apart(*inputs), built(program, fuse=False)(*inputs))


def test_a_norm_that_nothing_quantises_runs_channels_last() -> None:
    program = quantised(model("norm_before_float"), "w4a4")
    fused, inputs = built(program), program.example_inputs(2, seed=1)
    (norm,) = modules(fused, GroupNormQuantise)
    assert (norm.codes, norm.keep, norm.silu, norm.outputs) == (None, False, True, ("floats",))
    assert not any(is_op(n, aten.group_norm.default, aten.silu.default) for n in fused.graph.nodes)
    seen = {}
    norm.register_forward_hook(lambda _, given, result: seen.update(strides=result.stride(), shape=result.shape))
    fused(*inputs)
    assert seen["shape"] == (2, 32, 4, 4)
    assert seen["strides"] == (32 * 16, 1, 32 * 4, 32)


def test_the_quantiser_comes_before_the_upsampling() -> None:
    """A quarter of the pixels is quantised."""
    program = quantised(model("upsampled"), "w4a4")
    fused = built(program)
    assert not any(is_op(n, aten.upsample_nearest2d.vec) for n in fused.graph.nodes)
    shapes = []
    for layer in modules(fused, IntegerLayer):
        layer.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    fused(*program.example_inputs(1))
    assert shapes == [(1, 4, 4, 32), (1, 4, 4, 32)]


def test_rows_of_a_gate_stand_in_pairs() -> None:
    """The weight of the wide linear is the plain one's, a_0, g_0, a_1, g_1, …"""
    program = quantised(model("gated"), "w4a4")
    before, after = (modules(built(program, fuse=fuse), IntegerLayer)[0] for fuse in (False, True))
    assert after.gate == "gelu"
    for name in ("codes", "weight_scale", "bias"):
        a, g = getattr(before, name).chunk(2)
        assert torch.equal(getattr(after, name)[0::2], a)
        assert torch.equal(getattr(after, name)[1::2], g)


# ---- whole denoisers -----------------------------------------------------------------------------------------------

# Of a UNet: a ResNet block has two norms (in a transformer one more), a shift and, where channels change, a shortcut.
DENOISERS: Mapping[str, Mapping[str, int]] = {
    "cross_attention": {
        "merge_products": 5,  # q, k, v of four self-attentions; all blocks' k and v of the condition
        "sink_upsample": 1,
        "take_in_shift": 8,
        "quantise_group_norm": 21,
        "read_both": 4,
        "quantise_beside": 5,
        "statistics_from_products": 25,  # and one more for each skip connection
        "quantise_layer_norm": 12,
        "quantise_gate": 4,
        "gate_in_product": 4,
        "codes_from_products": 6,
    },
    "unconditional": {
        "merge_products": 4,
        "sink_upsample": 1,
        "take_in_shift": 8,
        "quantise_group_norm": 17,
        "read_both": 4,
        "quantise_beside": 4,
        "statistics_from_products": 17,
        "codes_from_products": 1,
    },
    "sdxl": {
        "merge_products": 9,
        "sink_upsample": 1,
        "take_in_shift": 8,
        "quantise_group_norm": 21,
        "read_both": 4,
        "quantise_beside": 4,
        "statistics_from_products": 21,
        "quantise_layer_norm": 24,
        "quantise_gate": 8,
        "gate_in_product": 8,
        "codes_from_products": 6,
    },
    "dit": {"merge_products": 2, "quantise_gate": 2, "codes_from_products": 6},
    "pixart": {"merge_products": 3, "quantise_gate": 4, "codes_from_products": 2},
    "sd3": {"merge_products": 5, "quantise_gate": 3, "codes_from_products": 2},
    "flux": {"merge_products": 3, "quantise_gate": 2, "codes_from_products": 3},
}


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers(captured, name: str) -> None:
    """As many sites as their blocks have; the same numbers up to float32 sums in another order."""
    original = captured(name) if name in ("cross_attention", "unconditional") else captured_denoiser(name)
    program = quantised(original, "w4a4")
    inputs = program.example_inputs(2, seed=7)
    plain, fused = built(program, fuse=False), built(program)
    assert {name: len(found) for name, found in sites(fused).items()} == DENOISERS[name]
    wanted, found = plain(*inputs), fused(*inputs)
    quantisation = relative(wanted, original.module()(*inputs))
    assert quantisation > 1e-3
    assert relative(found, wanted) <= max(0.1 * quantisation, 1e-6)
    assert work(fused) < work(plain)


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_done() -> None:
    report = built(quantised(model("another_form"), "w4a4")).meta["report"]
    assert report.text().splitlines() == [
        "merge_products: 1; not at 1: holds its weight in another form than the linears beside it",
        *(f"{fusion.name}: 0" for fusion in FUSIONS[1:]),
        "weights: 1 int8, 1 two digits; 0.0 MB",
    ]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["fusions"][0] == {
        "name": "merge_products",
        "sites": ["to_q"],
        "misses": [["to_v", "holds its weight in another form than the linears beside it"]],
    }
    assert [record["name"] for record in data["fusions"]] == [fusion.name for fusion in FUSIONS]
    # q and k of 32 × 32 in one tensor; v in two digits.
    assert (data["weights"], data["weight_bytes"]) == ({"int8": 1, "two digits": 1}, 2 * 32 * 32 + 2 * 32 * 32)


def test_the_report_counts_equal_reasons(captured) -> None:
    """One line a fusion, however many sites have the same reason."""
    report = built(quantised(captured("unconditional"), "w4a4")).meta["report"]
    line = next(line for line in report.text().splitlines() if line.startswith("quantise_group_norm"))
    assert line == "quantise_group_norm: 17; not at 4: the norm is of 3 axes, not of an image's four"
    counted = Counter(reason for record in report.fusions for _, reason in record.misses)
    assert counted["no integer convolution writes the floats that it reads"] == 4


# ---- attention of wide heads ---------------------------------------------------------------------------------------


def parts(heads: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k and v of two samples and six tokens, as slices of one product's output."""
    generator = torch.Generator().manual_seed(4)
    whole = torch.randn(2, 6, 3 * heads * width, generator=generator).to(dtype)
    return list(whole.chunk(3, -1))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """In float64, heads joined."""
    split = [t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    return functional.scaled_dot_product_attention(*split, scale=scale).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("most", [2**28, 0], ids=["kernels", "torch's fused one"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "width"), [(1, 320), (3, 288)])
def test_wide_attention(monkeypatch: pytest.MonkeyPatch, heads: int, width: int, dtype: torch.dtype, most: int) -> None:
    """Floats and codes; torch's own kernel for float32, and for more scores than memory should hold."""
    monkeypatch.setattr(wide_attention, "_MOST_SCORES", most)
    q, k, v = parts(heads, width, dtype)
    wanted = attention(q, k, v, heads, 0.05)
    floats = WideAttention(reference_kernels(), heads=heads, scale=0.05, codes=None)(q, k, v)
    assert (floats.dtype, floats.shape) == (dtype, (2, 6, heads * width))
    assert relative(floats, wanted) <= (1e-3 if dtype == torch.float16 else 1e-6)
    inverse = torch.tensor([9.0, 14.0])
    codes = Codes(low=-7, high=7, block=32)
    found = WideAttention(reference_kernels(), heads=heads, scale=0.05, codes=codes)(q, k, v, inverse)
    levels = (hadamard(wanted, 32, -1) * inverse.double().view(-1, 1, 1)).clamp(-7, 7)
    assert found.dtype == torch.int8
    assert len(found.unique()) > 10
    # Half precision of torch's fused kernel moves levels by some thousandths.
    assert float((found - levels).abs().max()) <= 0.5 + 0.03


def test_wide_attention_takes_the_kernel_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for float32, which the kernels do not take, nor for too many scores."""
    ran = []
    kernels = reference_kernels()
    object.__setattr__(kernels, "wide_attention", lambda q, *_, **how: ran.append(how["heads"]) or q)
    module = WideAttention(kernels, heads=2, scale=0.1, codes=None)
    module(*parts(2, 288, torch.float16))
    assert ran == [2]
    module(*parts(2, 288, torch.float32))
    monkeypatch.setattr(wide_attention, "_MOST_SCORES", 2 * 2 * 6 * 6 - 1)
    module(*parts(2, 288, torch.float16))
    assert ran == [2]


def test_wide_attention_copies_what_no_row_pitch_fits() -> None:
    q, k, v = parts(1, 320, torch.float16)
    turned = k.transpose(1, 2).contiguous().transpose(1, 2)
    seen = []
    kernels = reference_kernels()
    object.__setattr__(kernels, "wide_attention", lambda q, k, v, **_: seen.extend([q, k, v]) or q)
    WideAttention(kernels, heads=1, scale=0.1, codes=None)(q, turned, v)
    assert [t.stride(-1) for t in seen] == [1, 1, 1]
    assert torch.equal(seen[1], k)
    assert seen[0] is q


def test_wide_heads_in_a_model() -> None:
    """One call with the model's heads and scale; codes where a quantiser reads it, floats where none does."""
    for name, heads, scale in (("one_wide_head", 1, 320**-0.5), ("two_wide_heads", 2, 0.1)):
        fused = built(quantised(model(name), "w4a4"), torch.float16)
        (module,) = modules(fused, WideAttention)
        assert (module.heads, module.codes.block) == (heads, 32)
        assert module.scale == pytest.approx(scale)
        assert not modules(fused, Quantise)[1:]  # that of the tokens alone
    program = quantised(model("one_wide_head"), "w4a4", keep_float=("to_out",))
    fused, inputs = built(program, torch.float16), program.example_inputs(2, seed=3)
    (module,) = modules(fused, WideAttention)
    assert module.codes is None
    # The same codes of the tokens; torch's attention rounds in half precision, the plain one does not.
    assert 0 < relative(fused(*inputs), built(program, torch.float16, fuse=False)(*inputs)) <= 2e-3


def test_a_rotation_wider_than_a_tile_stays_with_its_quantiser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_attention, "WIDEST_BLOCK", 16)
    program = quantised(model("one_wide_head"), "w4a4")
    fused, inputs = built(program), program.example_inputs(2, seed=3)
    (module,) = modules(fused, WideAttention)
    assert module.codes is None
    assert len(modules(fused, Quantise)) == 2
    assert torch.equal(fused(*inputs), built(program, fuse=False)(*inputs))
