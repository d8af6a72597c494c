"""Sites become kernel calls: one quantiser for all that read the same codes, the product with what follows it.

    before   x → [hadamard] → quantize → int products → rescale → [+ r] → [silu]
    after    x → Quantise(x, 1/s) → IntegerLinear | IntegerConv2d(codes, s, [r])

What follows is taken into the product where it follows directly, nobody else reads what lies between, and r has the
product's own shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from hqc.passes.rewriting import Rewriter, rewrite
from hqc.program import Program, aten, is_op
from hqc.runtimes.integer.forms import site_input, site_rotation
from hqc.runtimes.integer.fusions import Placed
from hqc.runtimes.integer.fusions.fusion import only_reader
from hqc.runtimes.integer.kernel_set import Kernels
from hqc.runtimes.integer.layers import Codes, IntegerConv2d, IntegerLinear, Quantise
from hqc.runtimes.integer.scales import ScaleBanks, scale_banks
from hqc.runtimes.integer.weights import site_weight
from hqc.sites import QuantisedSite, quantised_sites

__all__ = ["drop_dead", "place_kernels"]

ops = torch.ops.hqc


@dataclass(frozen=True)
class _Tail:
    """What a product takes in: the nodes from the layer on, the residual, whether SiLU is among them."""

    nodes: tuple[fx.Node, ...]
    residual: fx.Node | None
    silu: bool

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


def place_kernels(program: Program, kernels: Kernels, *, device: torch.device, pack: bool) -> Placed:
    """Replaces every quantised site of a program in `integer_form`; weights go to the device.

    Raises:
        ExportError: for a weight that the kernels cannot hold.
    """
    edit = rewrite(program)
    modules: dict[str, nn.Module] = {}
    sites = list(quantised_sites(program.evolve(graph=edit.graph)))
    banks = scale_banks(edit, sites)
    quantisers: dict[Any, fx.Node] = {}
    for site in sites:
        codes = _codes(edit, site, kernels, banks, quantisers, modules)
        _place_product(
            edit, site, codes, banks.scale(_lookup(site)), modules, _layer_maker(program, site, kernels, device, pack)
        )
    drop_dead(edit.graph)
    return Placed(edit, modules)


def drop_dead(graph: fx.Graph) -> None:
    """Removes what nobody reads; module calls too, which fx would ask an owner of the graph about."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _lookup(site: QuantisedSite) -> fx.Node:
    return site.quantiser.args[1]  # type: ignore[return-value]


def _is_image(site: QuantisedSite) -> bool:
    return is_op(site.products[0].node, ops.int_conv2d.default)


def _codes(
    edit: Rewriter,
    site: QuantisedSite,
    kernels: Kernels,
    banks: ScaleBanks,
    quantisers: dict[Any, fx.Node],
    modules: dict[str, nn.Module],
) -> fx.Node:
    """The codes that a site reads; an earlier site's where they are the same."""
    fixed = site.bounds.lookups is None
    low, high = (site.bounds.low, site.bounds.high) if fixed else (None, None)
    x, rotation, image = site_input(site), site_rotation(site), _is_image(site)
    inverse = banks.inverse(_lookup(site), site.bounds)
    key = (x, inverse, low, high, rotation, image)
    if key not in quantisers:
        name = f"quantise_{len(quantisers)}"
        modules[name] = Quantise(kernels, Codes(low=low, high=high, **rotation._asdict()), image=image)
        with edit.graph.inserting_before(site.quantiser):
            node = edit.graph.call_module(name, (x, inverse))
        node.meta = {"site": site.site, "dtype": "int8", "role": "codes"}
        quantisers[key] = node
    return quantisers[key]


def _layer_maker(program: Program, site: QuantisedSite, kernels: Kernels, device: torch.device, pack: bool) -> Any:
    """silu -> the module of a site's product."""
    weight = site_weight(program, site, device=device, pack=pack)
    bias_node = site.layer.args[3]
    bias = None
    if isinstance(bias_node, fx.Node):
        bias = program.state[str(bias_node.target)].detach().to(device, torch.float32)

    reach, size = site.bounds.largest, [d if type(d) is int else 1 for d in site.quantiser.meta["shape"][1:]]

    def make(silu: bool) -> nn.Module:
        if not _is_image(site):
            return IntegerLinear(kernels, weight, bias, silu=silu, reach=reach, size=size[:-1])
        _, _, stride, padding, dilation, _ = site.products[0].node.args
        window: Any = {"stride": stride, "padding": padding, "dilation": dilation}
        return IntegerConv2d(kernels, weight, bias, silu=silu, window=window, reach=reach, size=size[1:])

    return make


def _place_product(
    edit: Rewriter, site: QuantisedSite, codes: fx.Node, scale: fx.Node, modules: dict[str, nn.Module], make: Any
) -> None:
    tail = _tail(site.layer)
    name = f"product_{len(modules)}"
    modules[name] = make(tail.silu)
    rest: dict[str, Any] = {} if tail.residual is None else {"residual": tail.residual}
    with edit.graph.inserting_before(tail.last):
        node = edit.graph.call_module(name, (codes, scale), rest)
    node.meta = {"shape": site.layer.meta["shape"], "dtype": "float32", "site": site.site, "role": "layer"}
    tail.last.replace_all_uses_with(node)
    for taken in reversed(tail.nodes[1:]):
        edit.graph.erase_node(taken)


def _tail(layer: fx.Node) -> _Tail:
    """The addition and the SiLU that directly follow a layer."""
    nodes, residual, silu = [layer], None, False
    following = only_reader(layer)
    if following is not None and (other := _residual(following, layer)) is not None:
        nodes.append(following)
        residual, following = other, only_reader(following)
    if following is not None and is_op(following, aten.silu.default):
        nodes.append(following)
        silu = True
    return _Tail(tuple(nodes), residual, silu)


def _residual(addition: fx.Node, layer: fx.Node) -> fx.Node | None:
    """What is added to a layer, if it is a tensor of the layer's own shape."""
    if not is_op(addition, aten.add.Tensor) or addition.kwargs:
        return None
    others = [a for a in _operands(addition) if a is not layer]
    if len(others) != 1:
        return None
    same = all(others[0].meta.get(key) == layer.meta.get(key) for key in ("shape", "dtype"))
    return others[0] if same and layer.meta.get("shape") is not None else None


def _operands(addition: fx.Node) -> Iterator[fx.Node]:
    return (a for a in addition.args[:2] if isinstance(a, fx.Node))
