"""The `tensorrt` target: standard operators and constant scales that TensorRT builds to int8 tensor-core kernels.

    activations   rotated, scaled, clipped, QuantizeLinear with a constant scale: `activations`
    products      DequantizeLinear pairs around Conv and MatMul, the timestep's scale behind them: `products`
    types         the sites in float32, the rest in the activations' type: `precision`

A per-sample scale commutes with a convolution, so that it can stand outside of the pair; as the pair's own scale it
would be a run-time tensor, for which TensorRT builds float kernels at best.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from hqc.bounds import QUANTISERS
from hqc.export.aten_math import MATH
from hqc.export.aten_shapes import SHAPES
from hqc.export.builder import typed
from hqc.export.lowering import Listen, Lowering, Tap, Translations
from hqc.export.ort_session import TENSORRT_PRODUCER
from hqc.export.reference import evaluate
from hqc.export.scale_bank import lookup_key
from hqc.export.shared import nearest_timestep
from hqc.export.tensorrt.activations import TensorRtState, hadamard, looked_up, quantize
from hqc.export.tensorrt.forms import Form, LayerForm, layer_forms, scale_table
from hqc.export.tensorrt.functions import ROTATING_NODES, plugin_functions
from hqc.export.tensorrt.options import TensorRtOptions
from hqc.export.tensorrt.precision import PRECISION, Precision, full_precision_nodes, set_precision
from hqc.export.tensorrt.products import rescale
from hqc.ops.weight_codes import fits_int4, pack_int4
from hqc.program import Program, aten, is_op
from hqc.sites import PRODUCTS, QuantisedSite, absorbed_nodes, quantised_sites, with_residual

__all__ = ["TensorRtLowering", "lower_tensorrt"]

ops = torch.ops.hqc
_INT4_BLOCKS = (128, 64, 32, 16)
"""At least two blocks, each with a scale: from these TensorRT builds a product that reads INT4; with one scale for each
channel it dequantises the weight first."""


def lower_tensorrt(
    program: Program,
    opset: int,
    options: TensorRtOptions,
    *,
    one_timestep: bool = False,
    forms: dict[str, LayerForm] | None = None,
) -> tuple[ir.Model, "TensorRtLowering"]:
    """The model with its functions, and its lowering, which holds the taps and the form of every layer.

    forms: of every layer; None: those that the options lead to.
    Requires: a captured program, or an integer one as `prepare(program, "tensorrt")` gives it.
    Raises:
        ExportError: for a site or an operator that has no form.
    """
    forms = layer_forms(program, options) if forms is None else forms
    lowering = TensorRtLowering(program, opset, options, forms, one_timestep=one_timestep)
    model = lowering.run()
    model.producer_name = TENSORRT_PRODUCER
    set_precision(model, lowering.builder, options.onnx_type)
    lowering.taps = _at_plugin_inputs(model, lowering.taps)
    for function in plugin_functions({node.op_type for node in model.graph if node.domain}, opset):
        model.functions[function.identifier()] = function
    return model, lowering


def _at_plugin_inputs(model: ir.Model, taps: Mapping[str, Tap]) -> Mapping[str, Tap]:
    """Where a plugin quantises, the input of a site is what the plugin reads, which may be behind a cast."""
    reads = {
        str(node.outputs[0].name): str(node.inputs[0].name)  # type: ignore[union-attr]
        for node in model.graph
        if node.op_type in ROTATING_NODES
    }
    return {site: replace(tap, input=Listen(reads.get(tap.codes.name, tap.input.name))) for site, tap in taps.items()}


class TensorRtLowering(TensorRtState):
    """Marks every ONNX node with the precision of the fx node that it came from."""

    def __init__(
        self,
        program: Program,
        opset: int,
        options: TensorRtOptions,
        forms: dict[str, LayerForm],
        *,
        one_timestep: bool = False,
    ) -> None:
        super().__init__(program, _TRANSLATIONS, opset, one_timestep=one_timestep)
        self.options, self.forms = options, forms
        self.absorbed = absorbed_nodes(program)
        self._full = full_precision_nodes(program)

    def translate(self, node: fx.Node) -> None:
        """Notes the precision of what the node becomes; what it shares is as precise as any of its readers asks."""
        self.builder.again.clear()
        super().translate(node)
        precision = Precision.FULL if node in self._full else Precision.ACTIVATION
        for shared in self.builder.again if precision is Precision.FULL else ():
            if shared.meta.get(PRECISION) is Precision.ACTIVATION:
                shared.meta[PRECISION] = precision
        for made in reversed(self.builder.graph):
            if PRECISION in made.meta:
                break
            made.meta[PRECISION] = Precision.PLUGIN if made.domain else precision

    def _find_taps(self) -> dict[str, Tap]:
        """At the very values that a site reads and gives: a transpose in front of it may be behind a cast."""
        taps = {}
        for site in quantised_sites(self.program):
            heard = (site.x, site.quantiser, with_residual(site.layer))
            x, codes, output = (Listen(str(self.value(node).name)) for node in heard)
            taps[site.site] = Tap(x, codes, output, rounding=self._rounding(site))
        return taps

    def _rounding(self, site: QuantisedSite) -> float:
        """A plugin's output and a sum of two products are of the activations' type; others are watched in float32."""
        typed = self.forms[site.site].form in (Form.INT4_PLUGIN, Form.FLOAT)
        return self.options.rounding if typed or with_residual(site.layer) is not site.layer else 0.0


# ---- translations --------------------------------------------------------------------------------------------------


def _index_select(lo: TensorRtState, node: fx.Node) -> ir.Value | None:
    """Scale tables are looked up by their readers, each in the form that it needs."""
    readers = (*QUANTISERS, ops.dequantize.default, ops.rescale.default)
    if lookup_key(lo.program, node) is not None and all(is_op(user, *readers) for user in node.users):
        return None
    return SHAPES[aten.index_select.default](lo, node)  # type: ignore[no-any-return]


def _dequantize(lo: TensorRtState, node: fx.Node) -> ir.Value | None:
    """Of activations where no integer product follows, and of weights."""
    b = lo.builder
    codes, scale = node.args
    if is_op(codes, *QUANTISERS):
        site, rank = str(node.meta["site"]), len(lo.shape(node))
        factor = looked_up(lo, scale, scale_table(lo.program, scale, site).numpy(), rank, f"{site}.scale")  # type: ignore[arg-type]
        return b.op("Mul", lo.value(codes), factor, name=node.name)
    if all(is_op(user, aten.linear.default) and _is_weight_only(lo, user) for user in node.users):
        return None  # the layer lays its weight out for itself
    stored = evaluate(lo.program, codes, {})  # type: ignore[arg-type]
    name = f"{node.meta.get('site', node.name)}.weight_{'int4' if fits_int4(stored) else 'int8'}"
    return _dequantized_weight(lo, stored, lo.program.state[str(scale.target)], 0, name)  # type: ignore[union-attr]


def _is_weight_only(lo: TensorRtState, layer: fx.Node) -> bool:
    form = lo.forms.get(str(layer.meta.get("site")))
    return form is not None and form.form is Form.INT4_WEIGHT_ONLY


def _dequantized_weight(
    lo: Lowering, codes: torch.Tensor, scale: torch.Tensor, axis: int, name: str, block: int = 0
) -> ir.Value:
    """DequantizeLinear of INT4 codes where they fit, else of int8 codes; a scale a channel, or a block along K."""
    b = lo.builder
    kind = ir.DataType.INT4 if fits_int4(codes) else ir.DataType.INT8
    factors = b.initializer(f"{name}_scale", ir.tensor(scale.numpy(), name=f"{name}_scale"))
    zeros = b.initializer(f"{name}_zero", _stored(torch.zeros(scale.shape, dtype=torch.int8), kind, f"{name}_zero"))
    stored = b.initializer(name, _stored(codes, kind, name))
    if block:
        return b.op("DequantizeLinear", stored, factors, zeros, axis=axis, block_size=block, name=f"{name}.real")
    return b.op("DequantizeLinear", stored, factors, zeros, axis=axis, name=f"{name}.real")


def _stored(codes: torch.Tensor, kind: ir.DataType, name: str) -> ir.TensorProtocol:
    if kind == ir.DataType.INT8:
        return ir.tensor(codes.to(torch.int8).numpy(), name=name)
    packed = pack_int4(codes.contiguous()).numpy()
    return ir.PackedTensor(packed, kind, shape=ir.Shape(codes.shape), name=name)


def _linear(lo: TensorRtLowering, node: fx.Node) -> ir.Value:
    """A float layer, or one with INT4 weights: MatMul with DequantizeLinear in blocks of K, which TensorRT fuses."""
    x, weight = node.args[:2]
    site = str(node.meta.get("site", node.name))
    if not _is_weight_only(lo, node):
        return MATH[aten.linear.default](lo, node)  # type: ignore[no-any-return]
    b = lo.builder
    codes, scale = (evaluate(lo.program, argument, {}) for argument in weight.args)  # type: ignore[union-attr, arg-type]
    channels = codes.shape[1]
    block = next((size for size in _INT4_BLOCKS if channels % size == 0 and channels > size), 0)
    factors = scale.repeat(channels // block, 1) if block else scale
    matrix = _dequantized_weight(lo, codes.T, factors, 0 if block else 1, f"{site}.weight_int4", block)
    y = b.op("MatMul", lo.value(x), typed(matrix, ir.DataType.FLOAT), name=site)
    bias = node.args[2] if len(node.args) > 2 else None
    return y if bias is None else b.op("Add", y, lo.value(bias), name=f"{site}.biased")


def _group_norm(lo: Lowering, node: fx.Node) -> ir.Value:
    """GroupNormalization with statistics in float32, one fused kernel in an engine."""
    x, groups = node.args[:2]
    shape = lo.shape(node)
    b, channels = lo.builder, int(shape[1])
    epsilon = float(node.args[4] if len(node.args) > 4 else node.kwargs.get("eps", 1e-5))  # type: ignore[arg-type]
    affine = []
    for index, name, neutral in ((2, "weight", 1.0), (3, "bias", 0.0)):
        given = node.args[index] if len(node.args) > index else node.kwargs.get(name)
        plain = b.constant(np.full(channels, neutral, np.float32))
        affine.append(plain if given is None else lo.value(given))
    rows = lo.value(x) if len(shape) > 2 else b.op("Unsqueeze", lo.value(x), b.ints(2))
    count, stash = int(groups), int(ir.DataType.FLOAT)  # type: ignore[arg-type]
    y = b.op("GroupNormalization", rows, *affine, epsilon=epsilon, num_groups=count, stash_type=stash, name=node.name)
    return y if len(shape) > 2 else b.op("Squeeze", y, b.ints(2))


def _attention(lo: Lowering, node: fx.Node) -> ir.Value:
    """softmax((q·scale)·kᵀ + mask)·v: scaled before the product, whose sum would leave float16 sooner."""
    plain = len(node.args) <= 4 and not set(node.kwargs) - {"scale", "attn_mask"}
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if not plain or (isinstance(mask, fx.Node) and str(mask.meta.get("dtype")) == "bool"):
        return MATH[aten.scaled_dot_product_attention.default](lo, node)  # type: ignore[no-any-return]
    b, shape = lo.builder, lo.shape(node.args[0])
    query, key, value = lo.values_of(node.args[:3])
    scale = node.kwargs.get("scale")
    factor = float(shape[-1]) ** -0.5 if scale is None else float(scale)  # type: ignore[arg-type]
    perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    scores = b.op("MatMul", b.op("Mul", query, b.scalar(factor)), b.transpose(key, perm))
    if mask is not None:
        scores = b.op("Add", scores, lo.value(mask))
    return b.op("MatMul", b.op("Softmax", scores, axis=-1), value, name=node.name)


def _baddbmm(lo: Lowering, node: fx.Node) -> ir.Value:
    """beta·input + (alpha·a) @ b, for the same reason."""
    b, alpha = lo.builder, float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    if node.kwargs.get("beta", 1) != 0 or alpha == 1:
        return MATH[aten.baddbmm.default](lo, node)  # type: ignore[no-any-return]
    return b.op("MatMul", b.op("Mul", lo.value(node.args[1]), b.scalar(alpha)), lo.value(node.args[2]), name=node.name)


def _unless_absorbed(translation: Any) -> Any:
    return lambda lo, node: None if node in lo.absorbed else translation(lo, node)


_TRANSLATIONS: Translations = {
    key: _unless_absorbed(translation)
    for key, translation in {
        **SHAPES,
        **MATH,
        ops.nearest_timestep.default: nearest_timestep,
        ops.hadamard.default: hadamard,
        **dict.fromkeys(QUANTISERS, quantize),
        ops.dequantize.default: _dequantize,
        ops.rescale.default: rescale,
        aten.index_select.default: _index_select,
        aten.linear.default: _linear,
        aten.group_norm.default: _group_norm,
        aten.scaled_dot_product_attention.default: _attention,
        aten.baddbmm.default: _baddbmm,
        **dict.fromkeys(
            (*PRODUCTS, ops.unpack_int4.default, ops.rotate_codes.default, ops.digit.default, ops.half.default),
            lambda lo, node: None,
        ),
    }.items()
}
