"""What a session made of a program: fusions with their misses, weights by form, where its kernels come from."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hqc.runtimes.integer.fusions import FusionRecord
from hqc.runtimes.integer.layers import IntegerLayer
from hqc.runtimes.integer.weights import weight_form

__all__ = ["BuildReport", "build_report"]


@dataclass(frozen=True)
class BuildReport:
    """fusions in their order; weights: form -> number of products; weight_bytes of all products on the device.

    tiles: on a GPU where the tiles of products come from, in one line; on a CPU how passes and products run.
    attention: how quantised attention runs.
    """

    fusions: tuple[FusionRecord, ...]
    weights: dict[str, int]
    weight_bytes: int
    tiles: str = ""
    attention: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    def text(self) -> str:
        """One line a fusion with its reasons, then weights and tiles."""
        lines = []
        for record in self.fusions:
            reasons = Counter(reason for _, reason in record.misses)
            missed = "".join(f"; not at {count}: {reason}" for reason, count in reasons.items())
            lines.append(f"{record.name}: {len(record.sites)}{missed}")
        forms = ", ".join(f"{count} {form}" for form, count in sorted(self.weights.items()))
        lines.append(f"weights: {forms}; {self.weight_bytes / 1e6:.1f} MB")
        lines += [f"attention: {self.attention}"] if self.attention else []
        return "\n".join([*lines, *([self.tiles] if self.tiles else [])])


def build_report(modules: Iterable[nn.Module], fusions: Sequence[FusionRecord]) -> BuildReport:
    """The report of the modules that a graph calls, before their weights are packed."""
    layers = [m for m in modules if isinstance(m, IntegerLayer)]
    tensors = [t for layer in layers for t in (layer.codes, layer.high) if t is not None]
    forms = Counter(weight_form(layer.weight) for layer in layers)
    return BuildReport(tuple(fusions), dict(forms), sum(t.numel() * t.element_size() for t in tensors))
