"""What tiles are chosen for: a card's name, its multiprocessors and the shared memory that a block may have."""

import re
from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["H100", "Card", "card_of", "shared_limit"]

_LARGE_SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""KiB of shared memory that a block may ask for, by compute capability."""
_SHARED = 99
"""The same on every other architecture from 8.0 on."""


@dataclass(frozen=True)
class Card:
    """A GPU as far as tiles go. shared_bytes: the most shared memory that a block may ask for."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

    @property
    def slug(self) -> str:
        """The name as part of a file's name.

        >>> H100.slug
        'nvidia-h100-80gb-hbm3'
        """
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "card"


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may have.

    >>> shared_limit((9, 0)) // 1024, shared_limit((8, 0)) // 1024, shared_limit((8, 9)) // 1024
    (227, 163, 99)
    """
    return _LARGE_SHARED.get(capability, _SHARED) * 1024


H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 132, shared_limit((9, 0)))
"""What is assumed where no GPU is asked."""


@lru_cache(maxsize=16)
def card_of(device: torch.device) -> Card:
    """The card of a CUDA device; of another device, an H100."""
    if device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(device)
    capability = (found.major, found.minor)
    return Card(found.name, capability, found.multi_processor_count, shared_limit(capability))
