"""Why a plugin cannot take a node of a site: asked of the plugins themselves, which know their kernels."""

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from hqc.export.tensorrt.options import TensorRtOptions
from hqc.export.tensorrt.weights import stored_codes
from hqc.ops.weight_codes import fits_int4
from hqc.plugins.hqc_qdp.nodes import OPS
from hqc.plugins.hqc_qdp.problems import PluginError
from hqc.program import Program, is_op
from hqc.rotations import Rotation
from hqc.sites import QuantisedSite

__all__ = ["product_obstacle", "rotation_attributes", "rotation_obstacle"]

ops = torch.ops.hqc
_LIMIT = 127


def rotation_obstacle(site: QuantisedSite, rotation: Rotation, options: TensorRtOptions) -> str:
    """Why no plugin can rotate a site's input and make its codes; empty if one can."""
    image = is_op(site.products[0].node, ops.int_conv2d.default)
    attributes = {**rotation_attributes(rotation), "channel_axis": 1 if image else -1}
    found = site.bounds.lookups
    if found is None:
        attributes |= {"low": site.bounds.low, "high": site.bounds.high}
        return _refusal("HadamardQuantize", (_dims(site.x), (None,)), options.dtype, attributes)
    if {bound.args[2] for bound in (found.low, found.high)} != {site.quantiser.args[1].args[2]}:  # type: ignore[union-attr]
        return "its range of codes is looked up by another row than its scale"
    return _refusal("HadamardQuantizeBounded", (_dims(site.x), (None, 3)), options.dtype, attributes)


def product_obstacle(
    program: Program, site: QuantisedSite, rotation: Rotation | None, span: tuple[int, int], options: TensorRtOptions
) -> str:
    """Why `Int4Linear` or `Int4Conv` cannot take a site whose codes, rotated if they are, have a span; or empty."""
    bits = program.plan[site.site].weight_bits if site.site in program.plan else None
    if bits is None or bits > 4:
        return f"{bits}-bit weights"
    stored = stored_codes(program, site.products[0].node.args[1])  # type: ignore[arg-type]
    if not fits_int4(stored):
        return f"codes {int(stored.min())}…{int(stored.max())} do not fit 4 bits"
    if span[0] < -_LIMIT or span[1] > _LIMIT:
        return f"past ±{_LIMIT}"
    product = site.products[0].node
    outputs, channels, *kernel = (int(d) for d in product.args[1].meta["shape"])  # type: ignore[union-attr]
    if channels % 2:
        return f"{channels} input channels do not fill whole bytes"
    dims = (_dims(site.x), (outputs, channels // 2), (outputs,), (None,), (outputs,))
    attributes = {"out_type": int(options.onnx_type), **rotation_attributes(rotation)}
    if not kernel:
        return _refusal("Int4Linear", dims, "int8", attributes)
    if uneven := _uneven(product, kernel):
        return uneven
    stride, padding = (int(product.args[i][0]) for i in (2, 3))  # type: ignore[index, arg-type]
    rows = (outputs, kernel[0] * kernel[1] * channels // 2)
    attributes |= {"kernel": kernel[0], "stride": stride, "padding": padding}
    return _refusal("Int4Conv", (dims[0], rows, *dims[2:]), "int8", attributes)


def rotation_attributes(rotation: Rotation | None) -> dict[str, int]:
    """What a plugin is told of the rotation of its weights; block 1 does not rotate."""
    block, regular = rotation or Rotation(1)
    return {"block": block, "regular": int(regular)}


def _uneven(product: fx.Node, kernel: Sequence[int]) -> str:
    """What a square window with one stride and one padding cannot say."""
    stride, padding, dilation = (tuple(product.args[i]) for i in (2, 3, 4))  # type: ignore[arg-type]
    if dilation != (1, 1):
        return f"dilation {dilation}"
    sizes = {"kernel": tuple(kernel), "stride": stride, "padding": padding}
    return next((f"uneven {name} {size}" for name, size in sizes.items() if size[0] != size[1]), "")


def _dims(node: fx.Node) -> tuple[int | None, ...]:
    return tuple(d if isinstance(d, int) else None for d in node.meta["shape"])


def _refusal(op: str, dims: Sequence[Sequence[int | None]], dtype: str, attributes: Mapping[str, int]) -> str:
    try:
        OPS[op].choices(dims, dtype, attributes)
    except PluginError as error:
        return error.found
    return ""
