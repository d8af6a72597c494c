"""Scales of activations that are learnt (LSQ): the step of every quantiser of a unit, its zero point as it is.

∂x̂/∂s = round(x/s) - x/s inside the range, the least or the largest code outside.   Source: LSQ (arXiv 1902.08153).
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hqc.program import Program

__all__ = ["LearntScales", "restored_scales"]

_TABLE = "activation_scale_table"
_LEAST = 1e-3
"""A scale stays above this share of the one that it started with."""


class LearntScales:
    """The activation scales of a unit while they are learnt.

    rate: of Adam, relative to a table's mean; it falls to 0 along a cosine.
    """

    def __init__(self, program: Program, sites: Sequence[str], rate: float) -> None:
        nodes = {str(node.target): node.name for node in program.graph.nodes if node.op == "get_attr"}
        names = [f"{site}.{_TABLE}" for site in sites]
        self._nodes = {name: nodes[name] for name in names}
        self._begun = {name: program.state[name] for name in names}
        self._scales = {name: nn.Parameter(scale.clone()) for name, scale in self._begun.items()}
        self.groups = [
            {"params": [scale], "lr": 0.0, "base_lr": rate * float(scale.detach().mean())}
            for scale in self._scales.values()
        ]

    @property
    def given(self) -> tuple[str, ...]:
        """The nodes whose values it gives."""
        return tuple(self._nodes.values())

    def values(self, done: float) -> tuple[dict[str, Tensor], Tensor | None]:
        """Their values after a share of the steps; nothing is added to the loss."""
        return {self._nodes[name]: scale for name, scale in self._scales.items()}, None

    def factor(self, done: float) -> float:
        """Of the rate after a share of the steps."""
        return (1 + math.cos(math.pi * done)) / 2

    def clip(self) -> None:
        """Keeps scales positive."""
        for name, scale in self._scales.items():
            scale.data.clamp_min_(_LEAST * float(self._begun[name].min()))

    def first(self) -> dict[str, Tensor]:
        """The values that the program has."""
        return {self._nodes[name]: scale for name, scale in self._begun.items()}

    def last(self) -> dict[str, Tensor]:
        """The values that were learnt."""
        return {self._nodes[name]: scale.detach().clone() for name, scale in self._scales.items()}

    def learnt(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; `restored_scales` makes tensors of it."""
        return {f"scales/{name}": scale.detach().clone() for name, scale in self._scales.items()}


def restored_scales(program: Program, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scales that were kept, by the names of the program's tensors."""
    return {name.partition("/")[2]: scale for name, scale in kept.items()}
