"""The `onnxruntime` target: integer products that are exact in int32, laid out for ONNX Runtime's CPU kernels.

    activations   rotated, scaled, rounded to uint8: `ort_activations`
    weights       INT4 in the file, int8 [K, O] in memory: `ort_weights`
    products      im2col, MatMulIntegerToFloat, scales, bias: `ort_products`

Unsigned activations and a signed weight are the fast path of that runtime.
"""

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from hqc.bounds import QUANTISERS
from hqc.export.aten_math import MATH
from hqc.export.aten_shapes import SHAPES
from hqc.export.attention_products import attention_products
from hqc.export.lowering import Lowering, Translations
from hqc.export.ort_activations import IntegerState, code_zero, dequantize, hadamard, quantize, requested_scales
from hqc.export.ort_attention import attention, product
from hqc.export.ort_products import rescale
from hqc.export.scale_bank import ScaleBank
from hqc.export.shared import int4_weight, looked_up, nearest_timestep
from hqc.export.softmax import softmax_quantize
from hqc.program import Program, aten, is_op
from hqc.sites import PRODUCTS, QuantisedSite, absorbed_nodes

__all__ = ["OnnxRuntimeLowering", "lower_onnxruntime"]

ops = torch.ops.hqc


def lower_onnxruntime(program: Program, opset: int, *, one_timestep: bool = False) -> tuple[ir.Model, Lowering]:
    """Requires: a captured program, or an integer one (`rotate_weights`, `split_digits`, optionally `pack_int4`)."""
    lowering = OnnxRuntimeLowering(program, opset, one_timestep=one_timestep)
    return lowering.run(), lowering


class OnnxRuntimeLowering(IntegerState):
    """Adds the bank of scales, and the nodes between a product and its rescale, which are emitted as one piece."""

    def __init__(self, program: Program, opset: int, *, one_timestep: bool = False) -> None:
        super().__init__(program, _TRANSLATIONS, opset, one_timestep=one_timestep)
        found = [one for one in attention_products(program) if not one.obstacle]
        self.code_products = {one.node: one for one in found}
        self.joint = {site.real for one in found for site in one.codes if site.real is not None}
        self.signed = frozenset(one.codes[1].quantiser for one in found if one.signed)
        self.bank = ScaleBank(self, requested_scales(program, self.shared))
        self.absorbed = absorbed_nodes(program)
        self.weights = {}

    def tap_details(self, site: QuantisedSite) -> dict[str, Any]:
        """Codes carry the zero point; the products' weights are watched."""
        if is_op(site.quantiser, ops.softmax_quantize.default):
            return {}
        weights = tuple(str(w.name) for w in self.weights.get(site.site, ()))
        zero, largest = int(code_zero(self, site.quantiser)), 2 * site.bounds.largest + 1
        return {"zero_point": zero, "weights": weights, "largest_code": largest}


# ---- dispatch ------------------------------------------------------------------------------------------------------


def _index_select(lo: OnnxRuntimeLowering, node: fx.Node) -> ir.Value | None:
    """Scale tables are looked up together, by the bank, when first asked for."""
    return None if lo.bank.holds(node) else SHAPES[aten.index_select.default](lo, node)


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
        ops.dequantize.default: dequantize,
        ops.unpack_int4.default: int4_weight,
        ops.lookup.default: looked_up,
        ops.softmax_quantize.default: softmax_quantize,
        ops.rescale.default: rescale,
        aten.scaled_dot_product_attention.default: attention,
        aten.matmul.default: product,
        aten.index_select.default: _index_select,
        **dict.fromkeys(
            (*PRODUCTS, ops.rotate_codes.default, ops.digit.default, ops.half.default), lambda lo, node: None
        ),
    }.items()
}
