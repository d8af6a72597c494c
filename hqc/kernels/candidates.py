"""The tiles that `hqc tune` tries for a product: what the model thinks best, and variants that it cannot tell apart."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hqc.kernels.cards import Card
from hqc.kernels.products import Product, ProductTile
from hqc.kernels.tile_model import fits, model_candidates, model_nanoseconds
from hqc.kernels.tuned import shipped_table

__all__ = ["tuning_candidates"]

_USUAL = 12
"""Tiles that the model ranks first."""
_VARIED = 4
"""Of those, how many are tried with other stages and warps."""
_MOST = 24
_WIDE = ((256, 64), (64, 256), (128, 256), (256, 128))
_SMALL = ((16, 32), (32, 32), (32, 64), (64, 32))
_FEW_ROWS = 256
"""Rows up to which small tiles are tried."""


def tuning_candidates(product: Product, card: Card, limits: Sequence[tuple[int, bool]]) -> tuple[ProductTile, ...]:
    """At most 24 tiles, the model's favourite first.

    limits: (`whole_rows`, `unsplit`) of the launches that compute the product; there is a tile for each of them.
    """

    def ranked(tiles: Iterator[ProductTile]) -> list[ProductTile]:
        return sorted(dict.fromkeys(tiles), key=lambda tile: model_nanoseconds(product, tile, card))

    found = dict[ProductTile, None]()
    for whole_rows, unsplit in limits:
        usual = ranked(t for t in model_candidates(product, card) if fits(product, t, card, unsplit=unsplit))
        inside = [t for t in usual if not whole_rows or whole_rows % t.rows == 0]
        found |= dict.fromkeys((inside or usual)[: _USUAL if len(limits) == 1 else _USUAL // 2 + 1])
    first = list(found)[:_VARIED]
    shipped = shipped_table(card)
    measured = () if shipped is None else shipped.products.get(product, ())
    found |= dict.fromkeys(timed.tile for timed in measured[:4])
    found |= dict.fromkeys(ranked(_other_shapes(product, first[0]))[:4])
    for tile in first:
        found |= dict.fromkeys(_variants(tile))
    return tuple(t for t in found if fits(product, t, card))[:_MOST]


def _other_shapes(product: Product, best: ProductTile) -> Iterator[ProductTile]:
    for rows, outputs in (*_WIDE, *(_SMALL if product.rows <= _FEW_ROWS else ())):
        warps = 8 if rows >= 256 or rows * outputs >= 128 * 256 else 4
        for splits in dict.fromkeys((1, best.splits)):
            yield ProductTile(rows, outputs, min(best.channels, 64), warps, 4, splits)


def _variants(tile: ProductTile) -> Iterator[ProductTile]:
    yield replace(tile, num_stages=tile.num_stages - 1 if tile.num_stages > 3 else tile.num_stages + 1)
    if tile.rows * tile.outputs >= 128 * 128 and tile.num_warps == 4:
        yield replace(tile, num_warps=8)
    if tile.num_stages == 4:
        yield replace(tile, num_stages=5)
