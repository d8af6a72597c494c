"""Where fusions nearly apply: every reason, word for word, and that nothing of the place is changed."""

import ast
import inspect
import sys
from collections.abc import Mapping

import pytest
import torch
from fusion_models import model
from integer_programs import quantised
from torch import fx

from hqc.program import aten, is_op
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.fusions import FUSIONS, Placed, fuse
from hqc.runtimes.integer.fusions.codes_from_products import CodesFromProducts
from hqc.runtimes.integer.fusions.quantise_beside import QuantiseBeside
from hqc.runtimes.integer.fusions.quantise_gate import GateInProduct
from hqc.runtimes.integer.fusions.quantise_norm import QuantiseGroupNorm, QuantiseLayerNorm
from hqc.runtimes.integer.fusions.sink_upsample import SinkUpsample
from hqc.runtimes.integer.kernel_set import reference_kernels
from hqc.runtimes.integer.layers import GateQuantise, IntegerConv2d, Quantise
from hqc.runtimes.integer.place import place_kernels
from hqc.runtimes.integer.tidy import tidied

CPU = torch.device("cpu")

MISSES: Mapping[str, tuple[str, str, str]] = {
    "another_form": ("merge_products", "to_v", "holds its weight in another form than the linears beside it"),
    "upsampled_unevenly": (
        "sink_upsample",
        "up",
        "the image is not enlarged by one whole factor along both axes",
    ),
    "shift_read_before": ("take_in_shift", "conv", "something else reads the product before the addition"),
    "shift_after_silu": ("take_in_shift", "conv", "its epilogue is full: a SiLU or another vector comes first"),
    "shift_of_rows": ("take_in_shift", "linear", "it has other axes than its product"),
    "norm_of_tokens": (
        "quantise_group_norm",
        "group_norm",
        "the norm is of 3 axes, not of an image's four",
    ),
    "norm_with_computed_weight": ("quantise_group_norm", "last", "its weight or bias is computed, not stored"),
    "norm_with_weight_alone": ("quantise_group_norm", "last", "it has a weight or a bias alone"),
    "norm_of_float": (
        "statistics_from_products",
        "last",
        "no integer convolution writes the floats that it reads",
    ),
    "three_parts": ("read_both", "last", "it reads 3 tensors side by side, not two"),
    "parts_read_elsewhere": (
        "read_both",
        "mean",
        "something else reads the concatenation, which is written anyway",
    ),
    "beside_before": (
        "quantise_beside",
        "shortcut",
        "it stands before the norm that reads the same image",
    ),
    "rows_modulated": ("quantise_layer_norm", "layer_norm", "nothing quantises the norm's result as it is"),
    "rows_normed_over_two_axes": (
        "quantise_layer_norm",
        "last",
        "the norm is over [16, 32], not over one axis of at most 16384",
    ),
    "rows_normed_with_computed_weight": (
        "quantise_layer_norm",
        "last",
        "its weight or bias is computed, not stored",
    ),
    "rows_normed_with_weight_alone": ("quantise_layer_norm", "last", "it has a weight or a bias alone"),
    "activation_read_twice": ("quantise_gate", "last", "something else reads the activation"),
    "gated_first_half": (
        "quantise_gate",
        "last",
        "the product it reads is no half times the other half's activation",
    ),
    "gate_with_halves_read_elsewhere": (
        "quantise_gate",
        "last",
        "the product it reads is no half times the other half's activation",
    ),
    "gate_of_floats": (
        "gate_in_product",
        "last",
        "its halves are not written by one linear for it alone",
    ),
    "gate_behind_residual": ("gate_in_product", "last", "its linear has another epilogue already"),
    "product_read_by_two": ("codes_from_products", "last", "something else reads the product"),
    "other_axes": ("codes_from_products", "last", "it reads the product's axes in another order"),
    "wide_head_with_a_mask": (
        "take_wide_attention",
        "reshape",
        "it has a mask, dropout, or shared keys",
    ),
    "wide_head_read_before_it_is_joined": (
        "take_wide_attention",
        "scaled_dot_product_attention",
        "its heads are no slices of tokens, or something else reads it before they are joined",
    ),
}
BY_HAND = (
    "something else than convolutions reads the codes",
    "its scale is computed after another reader of the norm",
    "its scale is computed after the norm that reads the same image",
    "its rotation is wider than half a tile of 128 outputs",
    "its rotation is wider than a tile of 128 outputs",
)
"""Reasons that no captured model gives: their graphs are edited below."""


@pytest.mark.parametrize("name", MISSES)
def test_a_miss_has_its_reason(name: str) -> None:
    """The one place of the fusion in the whole model."""
    fusion, site, reason = MISSES[name]
    program = quantised(model(name), "w4a4")
    module = integer_module(program, reference_kernels(), BuildOptions(CPU, torch.float32))
    record = next(r for r in module.meta["report"].fusions if r.name == fusion)
    assert record.misses == ((site, reason),)
    assert site not in record.sites


def test_narrow_heads_are_no_miss() -> None:
    program = quantised(model("narrow_heads"), "w4a4")
    module = integer_module(program, reference_kernels(), BuildOptions(CPU, torch.float32))
    assert not any(record.misses for record in module.meta["report"].fusions)


def test_every_reason_is_tested() -> None:
    """The texts that the fusions' sources hold."""
    written = set()
    for module in {type(fusion).__module__ for fusion in FUSIONS}:
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "miss":
                written |= {_start(text) for text in _texts(node.args[1])}
            if isinstance(node, ast.FunctionDef) and node.name == "_reason":
                returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
                written |= {_start(text) for value in returned for text in _texts(value)}
    tested = {reason for _, _, reason in MISSES.values()} | set(BY_HAND)
    assert len(written) > 15
    assert not {start for start in written if not any(reason.startswith(start) for reason in tested)}
    assert not {reason for reason in tested if not any(reason.startswith(start) for start in written)}


def _texts(node: ast.expr) -> list[ast.expr]:
    """The strings among an expression's outcomes."""
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    text = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and node.value)
    return [node] if text else []


def _start(text: ast.expr) -> str:
    """A string up to its first hole."""
    first = text.values[0] if isinstance(text, ast.JoinedStr) else text
    assert isinstance(first, ast.Constant)
    return str(first.value)


# ---- graphs edited by hand -----------------------------------------------------------------------------------------


def placed_of(name: str) -> Placed:
    """A model with kernel calls, before any fusion."""
    program = tidied(integer_form(quantised(model(name), "w4a4")))
    return place_kernels(program, reference_kernels(), device=CPU, pack=False)


def quantiser_of(placed: Placed, site: str) -> fx.Node:
    """The quantiser of a site."""
    found = [n for n in placed.edit.graph.nodes if isinstance(placed.module(n), Quantise) and n.meta["site"] == site]
    assert len(found) == 1
    return found[0]


def delay_scale(placed: Placed, quantiser: fx.Node) -> None:
    """The quantiser's scale is computed right before it."""
    late = placed.edit.call(quantiser, aten.mul.Tensor, quantiser.args[1], 2.0, dtype="float32", shape=("N",))
    quantiser.update_arg(1, late)


def test_codes_that_something_else_reads() -> None:
    placed = placed_of("upsampled")
    quantiser = quantiser_of(placed, "up")
    (convolution,) = quantiser.users
    placed.edit.call(convolution, aten.abs.default, quantiser)
    found = SinkUpsample().find(placed)
    assert (found.matches, found.misses) == ([], [("up", BY_HAND[0])])


@pytest.mark.parametrize(
    ("name", "fusion"), [("norm_kept", QuantiseGroupNorm), ("rows_normed_and_kept", QuantiseLayerNorm)]
)
def test_a_scale_that_comes_too_late(name: str, fusion: type) -> None:
    """Another reader of the norm stands between it and the quantiser's scale; without that reader it may be late."""
    placed = placed_of(name)
    quantiser = quantiser_of(placed, "last")
    delay_scale(placed, quantiser)
    found = fusion().find(placed)
    assert ([m.site for m in found.matches], found.misses) == (["last"], [])
    other = next(n for n in placed.edit.graph.nodes if is_op(n, aten.tanh.default))
    quantiser.args[1].prepend(other)
    found = fusion().find(placed)
    assert (found.matches, found.misses) == ([], [("last", BY_HAND[1])])


def test_a_scale_that_comes_after_the_norm_beside() -> None:
    placed = placed_of("skip")
    delay_scale(placed, quantiser_of(placed, "shortcut"))
    fuse(placed, FUSIONS[: [fusion.name for fusion in FUSIONS].index("quantise_beside")])
    found = QuantiseBeside().find(placed)
    assert (found.matches, found.misses) == ([], [("shortcut", BY_HAND[2])])


@pytest.mark.parametrize(
    ("name", "fusion", "widest", "reason"),
    [("gated", GateInProduct, 64, BY_HAND[3]), ("shift_of_image", CodesFromProducts, 128, BY_HAND[4])],
)
def test_a_rotation_that_no_tile_holds(name: str, fusion: type, widest: int, reason: str) -> None:
    placed = placed_of(name)
    fuse(placed, FUSIONS[: [f.name for f in FUSIONS].index(fusion.name)])
    codes = [m.codes for m in placed.modules.values() if isinstance(m, Quantise | GateQuantise)]
    for block, misses in ((widest, []), (2 * widest, [("last", reason)])):
        for module in codes:
            module.block = block
        found = fusion().find(placed)
        assert found.misses == misses
        assert [m.site for m in found.matches] == ([] if misses else ["last"])


def test_linears_beside_one_that_adds_a_residual_are_no_miss() -> None:
    """It is the residual that keeps them apart, and there is nothing beside the one that is left."""
    placed = placed_of("three_products")
    first, second, _ = [
        n for n in placed.edit.graph.nodes if n.meta.get("site", "").startswith("to_") and n.kwargs == {}
    ][-3:]
    second.update_kwarg("residual", first)
    (record,) = fuse(placed, FUSIONS[:1])
    assert (record.sites, record.misses) == (("to_q",), ())


def test_layers_and_codes_of_a_placed_graph() -> None:
    placed = placed_of("upsampled")
    quantiser = quantiser_of(placed, "up")
    (convolution,) = quantiser.users
    assert isinstance(placed.layer(convolution), IntegerConv2d)
    assert placed.layer(quantiser) is None
    assert placed.layer(None) is None
    assert (placed.codes_of(quantiser).low, placed.codes_of(quantiser).high) == (-7, 7)
    assert placed.kernels.name == "torch"
