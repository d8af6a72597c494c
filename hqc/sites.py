"""A quantised site in the graph of a program at any stage: its input, rotation, codes, products and layer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hqc.attentions import part_name, written_out
from hqc.bounds import DEQUANTISERS, FAKE_QUANTISERS, QUANTISERS, Bounds, bounds_of
from hqc.errors import ExportError
from hqc.program import Program, aten, is_op
from hqc.rotations import Rotation

__all__ = [
    "PRODUCTS",
    "Product",
    "QuantisedSite",
    "absorbed_nodes",
    "attention_quantisers",
    "branch_name",
    "end_of",
    "output_of",
    "products_of",
    "quantised_sites",
    "residual_name",
    "rotation_of",
    "rotation_within",
    "source_of",
    "watched_sites",
    "with_residual",
]

ops = torch.ops.hqc
PRODUCTS = (ops.int_linear.default, ops.int_conv2d.default)


@dataclass(frozen=True)
class Product:
    """One integer product and the factor that its result carries: 1, or 128 for a high digit."""

    node: fx.Node
    factor: int


def rotation_of(node: fx.Node) -> Rotation:
    """Of a node that rotates values, (x, block, axis, regular), or codes, (codes, block, regular): the one place."""
    at = 3 if is_op(node, ops.hadamard.default) else 2
    return Rotation(int(node.args[1]), bool(node.args[at]) if len(node.args) > at else False)  # type: ignore[arg-type]


def rotation_within(expression: Any) -> Rotation | None:
    """By what a weight's codes are rotated in the expression that a product reads, None if they are not."""
    node = expression
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_op(node, ops.rotate_codes.default):
            return rotation_of(node)
        node = node.args[0]
    return None


@dataclass(frozen=True)
class QuantisedSite:
    """The nodes of one site: x → [rotation] → quantiser → … → layer.

    `real` is the node that holds the dequantised activation (the fake quantiser itself, or dequantize), None in the
    integer form; `quantiser.args` is (rotated x, scale, low, high). Within attention `product` is what reads the real
    value, and `partner` the quantiser of its other operand, by name, where that has one.
    """

    site: str
    x: fx.Node
    quantiser: fx.Node
    layer: fx.Node
    real: fx.Node | None
    bounds: Bounds
    products: tuple[Product, ...] = ()
    product: fx.Node | None = None
    partner: str = ""


def products_of(accumulator: fx.Node) -> tuple[Product, ...]:
    """The products that an accumulator sums: one, two halves, or low + high·128."""
    if is_op(accumulator, *PRODUCTS):
        return (Product(accumulator, 1),)
    if is_op(accumulator, aten.add.Tensor):
        low, high = accumulator.args[:2]
        if is_op(low, *PRODUCTS) and is_op(high, *PRODUCTS):
            return (Product(low, 1), Product(high, 1))  # type: ignore[arg-type]
        if is_op(low, *PRODUCTS) and is_op(high, aten.mul.Scalar) and is_op(high.args[0], *PRODUCTS):  # type: ignore[union-attr]
            return (Product(low, 1), Product(high.args[0], int(high.args[1])))  # type: ignore[arg-type, union-attr]
    return ()


def absorbed_nodes(program: Program) -> set[fx.Node]:
    """Products, their digit sums and their weight expressions: a translation of `rescale` emits them as one piece.

    Raises:
        ExportError: for an accumulator that is no product.
    """
    absorbed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if not is_op(node, ops.rescale.default):
            continue
        accumulator: fx.Node = node.args[0]  # type: ignore[assignment]
        products = products_of(accumulator)
        if not products:
            raise ExportError(
                f"site {node.meta.get('site')}",
                "has an accumulator that is not a product",
                "Write the program again with hqc.",
            )
        absorbed.add(accumulator)
        for product in products:
            absorbed |= {product.node, *(u for u in product.node.users if is_op(u, aten.mul.Scalar))}
            absorbed |= _weight_nodes(product.node.args[1])
    return absorbed


def _weight_nodes(node: Any) -> set[fx.Node]:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return set()
    return {node} | _weight_nodes(node.args[0])


def quantised_sites(program: Program) -> Iterator[QuantisedSite]:
    """Every site whose activation is quantised, in graph order."""
    for site, layer in program.sites():
        found = _integer_site(program, site, layer) or _fake_site(program, site, layer)
        if found is not None:
            yield found


def attention_quantisers(program: Program) -> Iterator[QuantisedSite]:
    """The quantisers within attention that is written out, as sites: their layer is the quantised value itself."""
    for found in written_out(program):
        for part, real in found.quantisers.items():
            quantiser: fx.Node = real.args[0] if is_op(real, ops.dequantize.default) else real  # type: ignore[assignment]
            x: fx.Node = quantiser.args[0]  # type: ignore[assignment]
            product, *parts = next(one for one in found.products if part in one)
            (other,) = (one for one in parts if one != part)
            partner = part_name(found.name, other) if other in found.quantisers else ""
            bounds = bounds_of(quantiser, program)
            yield QuantisedSite(
                part_name(found.name, part), x, quantiser, real, real, bounds, product=product, partner=partner
            )


def watched_sites(program: Program) -> Iterator[QuantisedSite]:
    """Everything that is quantised besides weights: what the verification of an export listens to."""
    yield from quantised_sites(program)
    yield from attention_quantisers(program)


def _integer_site(program: Program, site: str, layer: fx.Node) -> QuantisedSite | None:
    if not is_op(layer, ops.rescale.default):
        return None
    products = products_of(layer.args[0])  # type: ignore[arg-type]
    if not products:
        return None
    quantiser: fx.Node = products[0].node.args[0]  # type: ignore[assignment]
    bounds = bounds_of(quantiser, program)
    return QuantisedSite(site, _before_rotation(quantiser), quantiser, layer, None, bounds, products)


def _fake_site(program: Program, site: str, layer: fx.Node) -> QuantisedSite | None:
    real: fx.Node = layer.args[0]  # type: ignore[assignment]
    if is_op(real, ops.hadamard.default):
        real = real.args[0]  # type: ignore[assignment]
    quantiser = real
    if is_op(real, *DEQUANTISERS) and is_op(real.args[0], *QUANTISERS):
        quantiser = real.args[0]  # type: ignore[assignment]
    elif not is_op(real, *FAKE_QUANTISERS):
        return None
    return QuantisedSite(site, _before_rotation(quantiser), quantiser, layer, real, bounds_of(quantiser, program))


def source_of(layer: fx.Node, *, through_smoothing: bool = True) -> fx.Node:
    """What a layer reads in front of its quantiser and rotation, and unless told otherwise its smoothing; any stage."""
    x: fx.Node = layer.args[0]  # type: ignore[assignment]
    if is_op(layer, ops.rescale.default) and (products := products_of(x)):
        x = products[0].node.args[0]  # type: ignore[assignment]
    passed = {*_QUANTISING, "smoothing", "shift"} if through_smoothing else _QUANTISING
    while x.meta.get("role") in passed:
        x = x.args[0]  # type: ignore[assignment]
    return x


def output_of(layer: fx.Node) -> fx.Node:
    """The whole result of a site: its layer's, or the sum with the product of its binary codes and its float branch."""
    own = with_residual(layer)
    return next((user for user in own.users if user.meta.get("role") == "branch" and user.args[0] is own), own)


def end_of(layer: fx.Node) -> fx.Node:
    """What the rest of the graph reads of a site: `output_of`, or the last sum with a LoRA of a style."""
    end: fx.Node = output_of(layer)
    while sums := [user for user in end.users if user.meta.get("role") == "style" and user.args[0] is end]:
        end = sums[0]
    return end


def with_residual(layer: fx.Node) -> fx.Node:
    """The result of a site's quantised weight: its layer's, or the sum with the product of its binary codes."""
    return next((user for user in layer.users if user.meta.get("role") == "residual" and user.args[0] is layer), layer)


def residual_name(site: str) -> str:
    """What the sum of a site and the product of its binary codes is called, in graphs and in exports.

    >>> residual_name("mid.conv1")
    'mid_conv1_with_residual'
    """
    return re.sub(r"\W", "_", f"{site}_with_residual")


def branch_name(site: str) -> str:
    """What the sum of a site and its branch is called, in graphs and in exports.

    >>> branch_name("mid.conv1")
    'mid_conv1_branch'
    """
    return re.sub(r"\W", "_", f"{site}_branch")


_QUANTISING = {"activation", "activation_quantizer", "codes", "rotation", "rotation_back"}


def _before_rotation(quantiser: fx.Node) -> fx.Node:
    x: fx.Node = quantiser.args[0]  # type: ignore[assignment]
    return x.args[0] if is_op(x, ops.hadamard.default) else x  # type: ignore[return-value]
