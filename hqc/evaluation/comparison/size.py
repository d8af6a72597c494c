"""How large a quantised model is by its true bits, whatever a file's containers are."""

from torch import fx

from hqc.program import Program

__all__ = ["true_bytes"]

_MERGED = ("lora_a", "lora_b")


def true_bytes(program: Program) -> float:
    """Bytes of every tensor: codes at their site's bits, LoRA as merged; scales, zeros, tables and floats as they are.

    Three-bit codes count three bits, which files keep in four.
    """
    layers = dict(program.sites())
    bits = {_stored_weight(layers[site.site]): site.weight_bits for site in program.plan.quantised}
    total = 0.0
    for name, tensor in program.state.items():
        if name.rpartition(".")[2] in _MERGED:
            continue
        width = bits.get(name)
        total += tensor.numel() * (8 * tensor.element_size() if width is None else width) / 8
    return total


def _stored_weight(layer: fx.Node) -> str:
    """What a layer's weight is quantised from; its name tells what passes did to it."""
    node: fx.Node = layer.args[1]  # type: ignore[assignment]
    while node.op != "get_attr":
        node = node.args[0]  # type: ignore[assignment]
    return str(node.target)
