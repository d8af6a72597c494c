"""How large a quantised model is by its true bits, whatever a file's containers are."""

from torch import fx

from hqc.bounds import bounds_of
from hqc.ops.weight_codes import fits_int4
from hqc.passes.rewriting import layer_inputs
from hqc.plan import SitePlan
from hqc.program import Program
from hqc.site_names import main_site

__all__ = ["true_bytes", "weight_bytes"]

_MERGED = ("lora_a", "lora_b")


def true_bytes(program: Program) -> float:
    """Bytes of every tensor: codes at their site's bits, LoRA as merged; scales, zeros, tables and floats as they are.

    Three-bit codes count three bits, which files keep in four; tables of a weight 2ⁿ numbers an output channel, of a
    byte where they are whole and of four where they are not, and their indices n bits.
    """
    layers = dict(program.sites())
    coded = program.plan.coded
    bits = {_stored_weight(layers[plan.site]): _bits(plan) for plan in coded}
    total = sum(_table_bytes(plan) for plan in coded if f"{plan.site}.weight_table" not in program.state)
    for name, tensor in program.state.items():
        if name.rpartition(".")[2] in _MERGED:
            continue
        width = bits.get(name)
        codes = tensor.numel() * (2 if name.endswith(".weight_packed") else 1)  # two a byte
        total += codes * (8 * tensor.element_size() if width is None else width) / 8
    return total


def weight_bytes(program: Program) -> tuple[float, float]:
    """Bytes of the quantised weights by their bits, and as an integer program keeps them.

    It keeps two codes a byte at sites of at most 4 bits whose codes all lie in -8…7, else one. Channels of mixed bits
    have their site's bits in the mean, binary codes beside them included.
    """
    by_bits = stored = 0.0
    layers = dict(program.sites())
    for plan in program.plan.coded:
        count, fits = _codes(program, plan, layers[plan.site])
        by_bits += count * _bits(plan) / 8 + _table_bytes(plan)
        stored += count / 2 if fits and (plan.weight_bits or 8) <= 4 else count
        stored += _table_bytes(plan) if plan.weight_only else 0  # whole tables are not stored: their codes take a byte
    return by_bits, stored


def _bits(plan: SitePlan) -> int:
    """Of a weight's codes in the mean; binary ones are counted where they belong, among those of their main site."""
    return 0 if main_site(plan.site) != plan.site else plan.weight_bits or 8


def _table_bytes(plan: SitePlan) -> float:
    entry = 4 if plan.weight_only else 1  # real numbers as they are stored, or whole ones of a byte
    return float(entry * plan.out_channels * 2 ** (plan.weight_bits or 8)) if plan.weight_lookup else 0.0


def _codes(program: Program, plan: SitePlan, layer: fx.Node) -> tuple[int, bool]:
    """How many codes a site's weight has, and whether they fit 4 bits."""
    if (packed := program.state.get(f"{plan.site}.weight_packed")) is not None:
        return 2 * packed.numel(), True
    if (codes := program.state.get(f"{plan.site}.weight_codes")) is not None:
        return codes.numel(), fits_int4(codes)
    if plan.weight_only:
        return program.state[_stored_weight(layer)].numel(), True
    bounds = bounds_of(layer_inputs(layer)[1], program)
    return program.state[_stored_weight(layer)].numel(), -8 <= bounds.low <= bounds.high <= 7


def _stored_weight(layer: fx.Node) -> str:
    """What a layer's weight is quantised from; its name tells what passes did to it."""
    node: fx.Node = layer.args[1]  # type: ignore[assignment]
    while node.op != "get_attr":
        node = node.args[0]  # type: ignore[assignment]
    return str(node.target)
