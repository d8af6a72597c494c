"""Tile sizes by shape: large tiles where there are enough of them to fill the processor, small ones where not.

Tiles of products come from measurements where there are any, else from `tile_model`.
"""

from collections.abc import Callable
from functools import lru_cache, partial

from hqc.errors import KernelError
from hqc.kernels.cards import H100, Card
from hqc.kernels.parameters import power_of_two
from hqc.kernels.products import Product, ProductTile
from hqc.kernels.tile_model import fits, model_candidates, model_nanoseconds, tile_channels
from hqc.kernels.tuned import Table, shipped_table

__all__ = ["ProductTile", "hadamard_nchw_tile", "hadamard_rows_tile", "product_tile", "tile_channels"]

_HADAMARD_ELEMENTS = 4096
"""Of a tile: 32 a thread, which four warps hold in registers with room for several programs a multiprocessor."""


def hadamard_rows_tile(
    rows: int, channels: int, block: int, *, multiprocessors: int = H100.multiprocessors
) -> tuple[int, int, int]:
    """(rows, channels, warps) of a tile for `hadamard_quantize` over rows of channels.

    Channels: a power of two that divides them if one of 64…256 does, so that no lane is masked; at least a block.
    Rows: the rest of the tile, halved while there are fewer than four tiles a multiprocessor.

    >>> hadamard_rows_tile(8192, 320, 32)
    (64, 64, 4)
    """
    wide = next((width for width in (256, 128, 64) if channels % width == 0), min(64, power_of_two(channels)))
    wide = max(wide, block, 16)
    tall = max(1, min(_HADAMARD_ELEMENTS // wide, power_of_two(rows)))
    columns = -(-channels // wide)
    while tall > 8 and -(-rows // tall) * columns < 4 * multiprocessors:
        tall //= 2
    return tall, wide, max(1, min(4, tall * wide * 4 // _HADAMARD_ELEMENTS))


def hadamard_nchw_tile(pixels: int, block: int) -> tuple[int, int, int]:
    """(pixels, channels, warps) of a tile for `hadamard_quantize` from NCHW.

    One warp, so that the butterfly over channels stays among its lanes and registers; 64 or 128 elements a thread.

    >>> hadamard_nchw_tile(4096, 32), hadamard_nchw_tile(4096, 128), hadamard_nchw_tile(9, 32)
    ((64, 32, 1), (32, 128, 1), (16, 32, 1))
    """
    wide = max(32, block)
    return min((2048 if wide <= 64 else 4096) // wide, power_of_two(pixels)), wide, 1


def product_tile(
    rows: int,
    outputs: int,
    channels: int,
    *,
    taps: int = 1,
    rotation: int = 1,
    two_digits: bool = False,
    card: Card = H100,
    whole_rows: int = 0,
    unsplit: bool = False,
    crowded: bool = False,
    tuned: Table | None = None,
) -> ProductTile:
    """The tile of a product, from the first of these that knows one which fits the product and the card.

    tuned, for this very product; the table that ships for the card, for this product or one nearly of its size; the
    model.  Every tile gives the same bits.

    whole_rows: rows of a sample where the tile must lie in one; if no tile can, that is left out of account.
    unsplit: the inner axis must not be split.  crowded: the epilogue holds a second tile; left out likewise.
    """
    product = Product(rows, outputs, channels, taps, rotation, two_digits)
    return _product_tile(product, card, whole_rows, unsplit, crowded, _Identity(tuned))


class _Identity:
    """A table in the key of a cache: the same for the same object."""

    def __init__(self, table: Table | None) -> None:
        self.table = table

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.table is other.table

    def __hash__(self) -> int:
        return id(self.table)


@lru_cache(maxsize=4096)
def _product_tile(
    product: Product, card: Card, whole_rows: int, unsplit: bool, crowded: bool, tuned: _Identity
) -> ProductTile:
    for whole, full in dict.fromkeys(((whole_rows, crowded), (whole_rows, False), (0, False))):
        usable = partial(fits, product, card=card, whole_rows=whole, unsplit=unsplit, crowded=full)
        found = _measured(product, card, tuned.table, usable) or _modelled(product, card, usable)
        if found is not None:
            return found
    raise KernelError("product_tile", f"no tile of {product} fits {card.name}", "Report it.")


def _measured(
    product: Product, card: Card, tuned: Table | None, usable: Callable[[ProductTile], bool]
) -> ProductTile | None:
    shipped = shipped_table(card)
    for table in (tuned, shipped):
        if table is not None and (found := table.exact(product, usable)) is not None:
            return found
    return None if shipped is None else shipped.near(product, usable, partial(_scaled, card))


def _scaled(card: Card, product: Product, tile: ProductTile) -> float:
    return model_nanoseconds(product, tile, card)


def _modelled(product: Product, card: Card, usable: Callable[[ProductTile], bool]) -> ProductTile | None:
    def cost(tile: ProductTile) -> tuple[float, int]:
        return model_nanoseconds(product, tile, card), tile.rows * tile.outputs  # of equals the smaller tile

    return min(filter(usable, model_candidates(product, card)), key=cost, default=None)
