"""Fusions: rewrites of the placed graph after which fewer kernels pass less memory, one a file, in their order.

Each has `find`, which gives matches and misses with reasons, and `apply`, which rewrites one match. `fuse` runs all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hqc.runtimes.integer.fusions.codes_from_products import CodesFromProducts
from hqc.runtimes.integer.fusions.fusion import Fusion, Placed
from hqc.runtimes.integer.fusions.merge_products import MergeProducts
from hqc.runtimes.integer.fusions.quantise_beside import QuantiseBeside
from hqc.runtimes.integer.fusions.quantise_gate import GateInProduct, QuantiseGate
from hqc.runtimes.integer.fusions.quantise_norm import QuantiseGroupNorm, QuantiseLayerNorm
from hqc.runtimes.integer.fusions.read_both import ReadBoth
from hqc.runtimes.integer.fusions.sink_upsample import SinkUpsample
from hqc.runtimes.integer.fusions.statistics_from_products import StatisticsFromProducts
from hqc.runtimes.integer.fusions.take_in_shift import TakeInShift
from hqc.runtimes.integer.fusions.wide_attention import TakeWideAttention

__all__ = ["FUSIONS", "FusionRecord", "Placed", "fuse"]

FUSIONS: Sequence[Fusion] = (
    MergeProducts(),
    SinkUpsample(),
    TakeInShift(),
    QuantiseGroupNorm(),
    ReadBoth(),
    QuantiseBeside(),
    StatisticsFromProducts(),
    QuantiseLayerNorm(),
    QuantiseGate(),
    GateInProduct(),
    CodesFromProducts(),
    TakeWideAttention(),
)


@dataclass(frozen=True)
class FusionRecord:
    """What one fusion did: the sites where it applies, and those where it nearly does with the reason why not."""

    name: str
    sites: tuple[str, ...]
    misses: tuple[tuple[str, str], ...]


def fuse(placed: Placed, fusions: Sequence[Fusion] = FUSIONS) -> tuple[FusionRecord, ...]:
    """Runs fusions on a placed graph, in place, but those that its kernels leave out."""
    records = []
    for fusion in (f for f in fusions if f.name not in placed.kernels.leaves_out):
        found = fusion.find(placed)
        for match in found.matches:
            fusion.apply(placed, match)
        records.append(FusionRecord(fusion.name, tuple(m.site for m in found.matches), tuple(found.misses)))
    return tuple(records)
