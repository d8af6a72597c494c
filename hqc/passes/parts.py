"""A layer as the sum of layers: what passes that split sites write."""

from collections.abc import Sequence

from torch import Tensor, fx

from hqc.passes.rewriting import Rewriter, layer_inputs
from hqc.program import Program, aten
from hqc.site_names import part_site, whole_site

__all__ = ["has_parts", "replace_by_parts"]


def has_parts(program: Program) -> bool:
    """Whether a layer of a program is split already."""
    return any(whole_site(site) != site for site, _ in program.sites())


def replace_by_parts(edit: Rewriter, site: str, parts: Sequence[tuple[fx.Node, Tensor]]) -> None:
    """Puts op(x_i, W_i) of every part, as sites `site:i`, and their sum in place of a layer; the first has the bias."""
    layer = edit.layers[site]
    bias, meta, name = layer_inputs(layer)[2], dict(layer.meta), layer.name
    rest = {key: meta[key] for key in ("shape", "dtype", "scope") if key in meta}
    results = list[fx.Node]()
    for number, (x, weight) in enumerate(parts):
        own = part_site(site, number)
        stored = edit.weight(f"{own}.weight", weight, layer)
        args = (x, stored, bias if number == 0 else None, *layer.args[3:])
        results.append(edit.call(layer, layer.target, *args, **{**meta, "site": own}))
    total = results[0]
    for result in results[1:]:
        total = edit.call(layer, aten.add.Tensor, total, result, site=site, **rest)
    layer.replace_all_uses_with(total)
    edit.graph.erase_node(layer)
    total.name = name  # what is known by the layer's node stays known: its output
