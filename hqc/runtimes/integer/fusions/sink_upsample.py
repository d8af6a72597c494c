"""Nearest-neighbour upsampling before a convolution is done by the convolution's reads.

    before   conv(quantise(upsample(x, k)))
    after    conv(quantise(x)) reading pixel (i // k, j // k)

Every pixel is rotated and quantised by itself, so the codes of copies are copies of the codes: exact.
"""

from typing import Any, ClassVar

from torch import fx

from hqc.program import aten, is_op
from hqc.runtimes.integer.fusions.fusion import Found, Match, Placed, calls_of, name_of, readers
from hqc.runtimes.integer.layers import IntegerConv2d, Quantise

__all__ = ["SinkUpsample"]


class SinkUpsample:
    """Quantises before the upsampling; a quarter of the codes is written, and no large image."""

    name: ClassVar[str] = "sink_upsample"

    def find(self, placed: Placed) -> Found:
        """Quantisers of an upsampled image whose codes only convolutions read."""
        found = Found()
        for node, module in calls_of(placed, Quantise):
            x = node.args[0]
            assert isinstance(x, fx.Node)
            if not module.image or not is_op(x, aten.upsample_nearest2d.vec):
                continue
            factor = _factor(x)
            layers = [placed.module(reader) for reader in readers(node)]
            if factor is None:
                found.miss(name_of(node), "the image is not enlarged by one whole factor along both axes")
            elif not all(isinstance(layer, IntegerConv2d) and layer.upsample == 1 for layer in layers):
                found.miss(name_of(node), "something else than convolutions reads the codes")
            else:
                found.matches.append(Match(name_of(node), (node, x, factor)))
        return found

    def apply(self, placed: Placed, match: Match) -> None:
        """Moves the factor into the convolutions."""
        node, upsampled, factor = match.nodes
        node.update_arg(0, upsampled.args[0])
        for reader in readers(node):
            layer = placed.module(reader)
            assert isinstance(layer, IntegerConv2d)
            layer.upsample = factor
        placed.erase([upsampled])


def _factor(upsample: fx.Node) -> int | None:
    """The whole number by which both axes grow."""
    before: Any = upsample.args[0].meta.get("shape")  # type: ignore[union-attr]
    after: Any = upsample.meta.get("shape")
    if before is None or after is None or not all(type(d) is int for d in (*before[2:], *after[2:])):
        return None
    factors = {b // a if b % a == 0 else 0 for a, b in zip(before[2:], after[2:], strict=True)}
    return factors.pop() if len(factors) == 1 and 0 not in factors else None
