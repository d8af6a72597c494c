"""What a program says of a LoRA that it has: merged into its weights, or beside them with a scale as an input."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["SCALE_INPUT", "Style", "attached_names", "scale_input"]

SCALE_INPUT = "lora_scale_"
"""What the name of an input that holds a LoRA's scale begins with."""


def scale_input(name: str) -> str:
    """The input that holds the scale of a LoRA.

    >>> scale_input("pixel_art")
    'lora_scale_pixel_art'
    """
    return f"{SCALE_INPUT}{name}"


def attached_names(inputs: Iterable[str]) -> tuple[str, ...]:
    """The LoRAs whose scales are among these inputs, in their order.

    >>> attached_names(["sample", "lora_scale_pixel_art"])
    ('pixel_art',)
    """
    return tuple(name.removeprefix(SCALE_INPUT) for name in inputs if name.startswith(SCALE_INPUT))


@dataclass(frozen=True)
class Style:
    """A LoRA of a program.

    file, sha256: what it was read from. scale: what it was merged with; of one beside the weights, what its input is
    where a caller gives none. rank: the largest of its sites. sites: how many it changes.
    """

    name: str
    file: str
    sha256: str
    scale: float
    rank: int
    sites: int
    merged: bool

    def __str__(self) -> str:
        where = f"merged at {self.scale:g}" if self.merged else f"input {scale_input(self.name)}, {self.scale:g} unless"
        given = "" if self.merged else " given"
        return f"{self.name} ({self.file}): {where}{given}; rank {self.rank} at {self.sites} sites"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Style":
        """Reads `to_dict`'s data.

        Raises:
            TypeError, ValueError: if it is none.
        """
        style = Style(**data)
        texts, counts = (style.name, style.file, style.sha256), (style.rank, style.sites)
        if not all(isinstance(text, str) for text in texts) or not scale_input(style.name).isidentifier():
            raise ValueError("a LoRA's name, file or checksum is none")
        if not all(type(count) is int and count > 0 for count in counts) or type(style.merged) is not bool:
            raise ValueError(f"LoRA {style.name!r} has a rank or sites of the wrong type")
        if not isinstance(style.scale, (int, float)) or not math.isfinite(style.scale):
            raise ValueError(f"LoRA {style.name!r} has a scale that is no number")
        return style
