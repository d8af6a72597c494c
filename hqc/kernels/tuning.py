"""Which tile a launch takes: that of the tuning that is in use, else what `product_tile` knows of the card."""

from typing import Any

import torch

from hqc.kernels.cards import card_of
from hqc.kernels.products import ProductTile
from hqc.kernels.tiles import product_tile

__all__ = ["chosen_tile"]


def chosen_tile(device: torch.device, rows: int, outputs: int, channels: int, **form: Any) -> ProductTile:
    """As `product_tile` for the card of a device."""
    return product_tile(rows, outputs, channels, card=card_of(device), **form)
