"""Which form every layer takes in the engine, with its reason, and the constant scale of its quantiser.

    static scale   s₀ = 2^e: the power of two nearest the median of the site's table, halved until
                   max_o( Σ_k |w[o,k]| · s_w[o] ) · max(|qmin|, qmax) · s₀ ≤ 65 504 / 2

s₀ is what QuantizeLinear and DequantizeLinear carry; the timestep's scale multiplies outside of the pair. The product
of the two dequantised operands is then y·s₀/s(t), and the bound keeps it a factor of two below the largest float16 for
any input, so that an engine may keep it in half precision. A power of two multiplies without rounding: codes, and the
result, are those of the scale s(t) itself. Sites that share codes share s₀, the smallest that any of them allows.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx

from hqc.errors import ExportError
from hqc.export.reference import evaluate
from hqc.export.scale_bank import lookup_key
from hqc.export.tensorrt.options import TensorRtOptions
from hqc.export.tensorrt.plugin_fit import product_obstacle, rotation_obstacle
from hqc.export.tensorrt.weights import int8_digits, total_codes
from hqc.ops.weight_codes import fits_int4
from hqc.program import Program, is_op
from hqc.sites import QuantisedSite, quantised_sites, rotation_of, rotation_within

__all__ = ["FLOAT16_MAX", "Form", "LayerForm", "layer_forms", "scale_table", "static_scale"]

ops = torch.ops.hqc
FLOAT16_MAX = 65504.0


class Form(StrEnum):
    """How a layer runs in the engine."""

    INT8_CONV = "int8 conv"
    INT8_CONV_TWO_DIGITS = "int8 conv, two digits"
    INT8_GEMM = "int8 gemm"
    INT8_GEMM_TWO_DIGITS = "int8 gemm, two digits"
    INT4_PLUGIN = "int4 plugin"
    INT4_WEIGHT_ONLY = "int4 weight-only"
    FLOAT = "float"


@dataclass(frozen=True)
class LayerForm:
    """One layer: its form and why; the rest is None where it does not apply.

    `block` and `kind` of its activations' rotation, `rotation` what makes it, a conv, a matmul or the plugin, empty for
    none; `weight_bits_stored` what a weight
    takes in the file; `static_scale` s₀, where there is a QuantizeLinear; `scale_range` the least and the largest s(t);
    `overflow_margin` how many times the worst product of dequantised operands fits float16.
    """

    site: str
    form: Form
    reason: str
    block: int = 0
    rotation: str = ""
    weight_bits_stored: int | None = None
    static_scale: float | None = None
    scale_range: tuple[float, float] | None = None
    overflow_margin: float | None = None
    kind: str = ""

    @property
    def integer(self) -> bool:
        """Whether its product runs on codes."""
        return self.form not in (Form.FLOAT, Form.INT4_WEIGHT_ONLY)

    @property
    def two_digits(self) -> bool:
        """Whether one int8 weight does not hold it."""
        return self.form in (Form.INT8_CONV_TWO_DIGITS, Form.INT8_GEMM_TWO_DIGITS)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return asdict(self)


def layer_forms(program: Program, options: TensorRtOptions) -> dict[str, LayerForm]:
    """Every site of a prepared program, in graph order.

    Raises:
        ExportError: naming a site that no form fits.
    """
    quantised = {site.site: site for site in quantised_sites(program)}
    facts = {name: _facts(program, site) for name, site in quantised.items() if site.real is None}
    scales = _static_scales(program, quantised, facts)
    rotations = (record for record in program.history if record.text.startswith("rotate_weights"))
    missed = {site: reason for record in rotations for site, reason in record.missed}
    found = {}
    for name, layer in program.sites():
        if name in facts:
            found[name] = _integer_form(program, quantised[name], facts[name], scales[name], options)
        else:
            found[name] = _float_form(program, name, layer, missed)
    return found


@dataclass(frozen=True)
class _Facts:
    """What the forms need to know about a weight: its span, digits, and max_o Σ|w|·s_w[o] over its products."""

    low: int
    high: int
    digits: int
    weight_sum: float


def _facts(program: Program, site: QuantisedSite) -> _Facts:
    total = total_codes(program, site.products)
    scale = program.state[str(site.layer.args[2].target)].to(torch.float64)  # type: ignore[union-attr]
    if not bool((scale > 0).all() & scale.isfinite().all()):
        raise ExportError(f"site {site.site}", "has a weight scale that is not positive", "Quantise it again.")
    digits = int8_digits(total, site.site)
    top = site.bounds.largest
    for digit in digits:
        accumulator = top * int(digit.codes.long().abs().flatten(1).sum(1).max())
        if accumulator >= 2**31:
            raise ExportError(f"site {site.site}", f"accumulators reach {accumulator}, past int32", "Leave it float.")
    sums = (digit.factor * float((digit.codes.double().abs().flatten(1).sum(1) * scale).max()) for digit in digits)
    return _Facts(int(total.min()), int(total.max()), len(digits), max(sums))


# ---- static scales -------------------------------------------------------------------------------------------------


def scale_table(program: Program, scale: Any, site: str) -> Tensor:
    """The table that an activation scale is looked up from, float32 [T].

    Raises:
        ExportError: if it is computed in another way.
    """
    if not isinstance(scale, fx.Node) or lookup_key(program, scale) is None:
        raise ExportError(
            f"site {site}", "its activation scale is not looked up from a table", "Use insert_qdq's tables."
        )
    return program.state[str(scale.args[0].target)].to(torch.float32)  # type: ignore[union-attr]


def static_scale(table: Tensor, weight_sum: float, largest_code: int) -> float:
    """s₀ of a site on its own; see the module's docstring.

    >>> static_scale(torch.tensor([0.4, 0.5, 0.6]), weight_sum=10.0, largest_code=7)
    0.5
    >>> static_scale(torch.tensor([0.4, 0.5, 0.6]), weight_sum=100_000.0, largest_code=7)
    0.03125
    """
    exponent = round(math.log2(float(table.median())))
    worst = weight_sum * largest_code
    if worst > 0:
        exponent = min(exponent, math.floor(math.log2(FLOAT16_MAX / 2 / worst)))
    return 2.0**exponent


def _static_scales(
    program: Program, sites: Mapping[str, QuantisedSite], facts: Mapping[str, _Facts]
) -> dict[str, float]:
    """s₀ by site; equal for all sites that read the same codes."""
    groups: dict[object, list[str]] = {}
    for name in facts:
        groups.setdefault(_codes_key(program, sites[name]), []).append(name)
    scales: dict[str, float] = {}
    for names in groups.values():
        common = min(_own_scale(program, sites[name], facts[name]) for name in names)
        scales |= dict.fromkeys(names, common)
    return scales


def _own_scale(program: Program, site: QuantisedSite, facts: _Facts) -> float:
    return static_scale(scale_table(program, site.quantiser.args[1], site.site), facts.weight_sum, site.bounds.largest)


def _codes_key(program: Program, site: QuantisedSite) -> object:
    """Equal for sites whose codes are the same tensor."""
    rotated, scale = site.quantiser.args[:2]
    rotation = rotated.args[1:] if is_op(rotated, ops.hadamard.default) else ()  # type: ignore[union-attr]
    return site.x, rotation, lookup_key(program, scale), site.bounds.key  # type: ignore[arg-type]


# ---- forms ---------------------------------------------------------------------------------------------------------


def _integer_form(
    program: Program, site: QuantisedSite, facts: _Facts, static: float, options: TensorRtOptions
) -> LayerForm:
    table = scale_table(program, site.quantiser.args[1], site.site)
    rotation = site.quantiser.args[0]
    turn = rotation_of(rotation) if is_op(rotation, ops.hadamard.default) else None  # type: ignore[arg-type]
    back = rotation_within(site.products[0].node.args[1])
    image = is_op(site.products[0].node, ops.int_conv2d.default)
    form, reason = _int8_form(image, facts), _int8_reason(facts, rotated=back is not None)
    by: str = (options.image_rotation if image else options.token_rotation) if turn else ""
    if options.plugins == "qdp":
        obstacle = product_obstacle(program, site, back, (facts.low, facts.high), options)
        if obstacle:
            reason += f"; not the int4 plugin: {obstacle}"
        else:
            form, reason = Form.INT4_PLUGIN, f"4-bit weights; {reason}"
        obstacle = rotation_obstacle(site, turn, options) if turn else ""
        if obstacle:
            reason += f"; rotated by standard operators: {obstacle}"
        elif turn:
            by = "plugin"
    worst = facts.weight_sum * site.bounds.largest * static
    quantised = form is not Form.INT4_PLUGIN or by != "plugin"
    return LayerForm(
        site.site,
        form,
        reason,
        turn.block if turn else 0,
        by,
        weight_bits_stored=4 if form is Form.INT4_PLUGIN else 8 * facts.digits,
        static_scale=static if quantised else None,
        scale_range=(float(table.min()), float(table.max())),
        overflow_margin=round(FLOAT16_MAX / worst, 3) if worst and form is not Form.INT4_PLUGIN else None,
        kind=turn.kind if turn else "",
    )


def _int8_form(image: bool, facts: _Facts) -> Form:
    if image:
        return Form.INT8_CONV if facts.digits == 1 else Form.INT8_CONV_TWO_DIGITS
    return Form.INT8_GEMM if facts.digits == 1 else Form.INT8_GEMM_TWO_DIGITS


def _int8_reason(facts: _Facts, *, rotated: bool) -> str:
    span = f"codes{' times H' if rotated else ''} span {facts.low}…{facts.high}"
    return f"{span}, {'within int8' if facts.digits == 1 else 'past int8: two products'}"


def _float_form(program: Program, name: str, layer: fx.Node, missed: Mapping[str, str]) -> LayerForm:
    """A layer without an integer product: float as planned, weight-only, or with accumulators past int32."""
    reason = missed.get(name, "the program is not quantised").removeprefix("float: ")
    weight = layer.args[1] if len(layer.args) > 1 else None
    if not is_op(weight, ops.dequantize.default):
        return LayerForm(name, Form.FLOAT, reason)
    if fits_int4(evaluate(program, weight.args[0], {})):  # type: ignore[union-attr, arg-type]
        return LayerForm(name, Form.INT4_WEIGHT_ONLY, reason, weight_bits_stored=4)
    return LayerForm(name, Form.FLOAT, f"{reason}; its int8 weights are dequantised", weight_bits_stored=8)
