"""Which tile a launch takes: the one that is forced, that of the tuning in use, or what is known of the card.

A table of the user's own card is in use within `use`; CUDA graphs keep the tiles that they were captured with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch

from hqc.errors import ArtefactError
from hqc.kernels.cards import Card, card_of
from hqc.kernels.products import Product, ProductTile
from hqc.kernels.tiles import product_tile
from hqc.kernels.tuned import Table, kernels_version, read_table, shipped_table, tiles_cache, triton_version

__all__ = ["Asked", "chosen_tile", "force", "load_tuning", "stale", "tuning_file", "use", "watch"]

Asked = Callable[[Product, int, bool], None]
"""Told of every product that a tile is asked for: the product, `whole_rows`, `unsplit`."""
_TABLE: ContextVar[Table | None] = ContextVar("tiles of the user's card", default=None)
_FORCED: ContextVar[ProductTile | None] = ContextVar("the tile of every product", default=None)
_WATCHER: ContextVar[Asked | None] = ContextVar("who is told of products", default=None)


def chosen_tile(
    device: torch.device,
    rows: int,
    outputs: int,
    channels: int,
    *,
    taps: int = 1,
    rotation: int = 1,
    two_digits: bool = False,
    whole_rows: int = 0,
    unsplit: bool = False,
    crowded: bool = False,
) -> ProductTile:
    """As `product_tile` for the card of a device and the table in use."""
    if (watcher := _WATCHER.get()) is not None:
        watcher(Product(rows, outputs, channels, taps, rotation, two_digits), whole_rows, unsplit)
    if (forced := _FORCED.get()) is not None:
        return forced
    form: dict[str, Any] = {"taps": taps, "rotation": rotation, "two_digits": two_digits}
    limits: dict[str, Any] = {"card": card_of(device), "whole_rows": whole_rows, "unsplit": unsplit, "crowded": crowded}
    return product_tile(rows, outputs, channels, **form, **limits, tuned=_TABLE.get())


@contextmanager
def use(table: Table | None) -> Iterator[None]:
    """Launches of this thread take tiles from `table` first; None: from no table of the user's."""
    before = _TABLE.set(table)
    try:
        yield
    finally:
        _TABLE.reset(before)


@contextmanager
def force(tile: ProductTile) -> Iterator[None]:
    """Every product of this thread is computed in one tile."""
    before = _FORCED.set(tile)
    try:
        yield
    finally:
        _FORCED.reset(before)


@contextmanager
def watch(watcher: Asked) -> Iterator[None]:
    """`watcher` is told of every product of this thread."""
    before = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(before)


def tuning_file(card: Card) -> Path:
    """Where `hqc tune` keeps the tiles of a card."""
    return tiles_cache() / f"{card.slug}.json"


def load_tuning(tune: Literal["auto", "off"] | Path, card: Card) -> tuple[Table | None, str]:
    """The user's table for a card, and one line that says where tiles come from.

    tune: "auto" for the file that `hqc tune` keeps, a file, or "off".  A file that is missing, damaged, stale or of
    another card is left out, and the line says why.
    """
    shipped = shipped_table(card)
    usual = (
        f"tiles: modelled; no table for {card.name}" if shipped is None else f"tiles: measured for {shipped.card.name}"
    )
    usual += " (shipped)" if shipped is not None else ""
    if tune == "off":
        return None, usual
    path = tuning_file(card) if tune == "auto" else Path(tune)
    if tune == "auto" and not path.exists():
        return None, usual if shipped is not None else f"{usual} – run hqc tune"
    try:
        table = read_table(path)
    except ArtefactError as error:
        return None, f"{usual}; {path} {error.found}"
    reason = stale(table, card)
    if reason:
        return None, f"{usual}; {path} {reason} – run hqc tune"
    count = len(table.products)
    return table, f"tiles: tuned on this card, {count} shape{'' if count == 1 else 's'}, {path}"


def stale(table: Table, card: Card) -> str:
    """Why a table's times say nothing about this card and these kernels; empty if they do."""
    if (table.card.name, table.card.capability) != (card.name, card.capability):
        return f"is of {table.card.name}, not of {card.name}"
    if table.card.multiprocessors != card.multiprocessors:
        return f"is of {table.card.multiprocessors} multiprocessors, not of {card.multiprocessors}"
    if table.made.get("kernels") != kernels_version():
        return "is stale (other kernels)"
    if table.made.get("triton") != triton_version():
        return f"is stale (triton {table.made.get('triton') or 'unknown'}, here {triton_version() or 'none'})"
    return ""
