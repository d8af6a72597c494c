"""Measured tiles: a table of products with the tiles that were tried and how long each took, and where tables lie.

    hqc/kernels/tuned/CARD.json                        ships with the package
    $XDG_CACHE_HOME/hqc/tiles/CARD.json                written by `hqc tune`

A file: {"format": 1, "card": {name, capability, multiprocessors}, "made": {date, torch, triton, kernels, …},
"products": [{rows, outputs, channels, taps, rotation, two_digits, "tiles": [[us, rows, outputs, channels, warps,
stages, splits], …]}, …]}.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from hqc.atomic import write_file
from hqc.errors import ArtefactError
from hqc.kernels.cards import Card, shared_limit
from hqc.kernels.products import Product, ProductTile

__all__ = [
    "Table",
    "Timed",
    "kernels_version",
    "read_table",
    "refuse_foreign_table",
    "shipped_table",
    "tiles_cache",
    "triton_version",
    "write_table",
]

FORMAT = 1
_NEAR = 1.3
"""The factor between two shapes, over rows, outputs and channels together, up to which one speaks for the other.

Farther ones choose worse than the model does: waves of programs end elsewhere.
"""
_LARGEST = 2**31
_FIELDS = {"rows": int, "outputs": int, "channels": int, "taps": int, "rotation": int, "two_digits": bool}


@dataclass(frozen=True)
class Timed:
    """A tile and the microseconds that a product took in it."""

    us: float
    tile: ProductTile


@dataclass(frozen=True)
class Table:
    """Measurements on one card, a product's tiles from the quickest on. made: what they were made with."""

    card: Card
    products: Mapping[Product, tuple[Timed, ...]]
    made: Mapping[str, str] = field(default_factory=dict)

    def exact(self, product: Product, usable: Callable[[ProductTile], bool]) -> ProductTile | None:
        """The quickest usable tile of this very product."""
        return next((timed.tile for timed in self.products.get(product, ()) if usable(timed.tile)), None)

    def near(
        self, product: Product, usable: Callable[[ProductTile], bool], model: Callable[[Product, ProductTile], float]
    ) -> ProductTile | None:
        """The quickest usable tile of the nearest product of its kind, times scaled as the model scales them."""
        found = min(self.products, key=lambda other: (_distance(product, other), other), default=None)
        if found is None or _distance(product, found) > math.log2(_NEAR):
            return None
        scaled = [
            (timed.us * model(product, timed.tile) / model(found, timed.tile), index, timed.tile)
            for index, timed in enumerate(self.products[found])
            if usable(timed.tile)
        ]
        return min(scaled)[2] if scaled else None

    def to_json(self) -> dict[str, Any]:
        """Plain data, as a file holds it."""
        card = {
            "name": self.card.name,
            "capability": list(self.card.capability),
            "multiprocessors": self.card.multiprocessors,
        }
        products = [
            asdict(product) | {"tiles": [_tile_row(timed) for timed in tiles]}
            for product, tiles in self.products.items()
        ]
        return {"format": FORMAT, "card": card, "made": dict(self.made), "products": products}


def _tile_row(timed: Timed) -> list[float]:
    tile = timed.tile
    return [timed.us, tile.rows, tile.outputs, tile.channels, tile.num_warps, tile.num_stages, tile.splits]


def _distance(product: Product, other: Product) -> float:
    """Between two shapes of one kind, the logarithm of how far they are apart; infinity between kinds."""
    same = (
        product.taps == other.taps
        and product.rotation == other.rotation
        and product.two_digits == other.two_digits
        and (product.channels % 16 == 0) == (other.channels % 16 == 0)
    )
    if not same:
        return math.inf
    pairs = (
        (product.rows, other.rows),
        (product.outputs, other.outputs),
        (product.channels, other.channels),
    )
    return sum(abs(math.log2(a / b)) for a, b in pairs)


# ---- files ---------------------------------------------------------------------------------------------------------


def tiles_cache() -> Path:
    """`$XDG_CACHE_HOME/hqc/tiles`, or `~/.cache/hqc/tiles`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "hqc" / "tiles"


def read_table(path: Path) -> Table:
    """The table of a file.

    Raises:
        ArtefactError: if it cannot be read, is damaged, or has another format.
    """
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(str(path), f"cannot be read ({error.strerror})", "Run `hqc tune` again.") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ArtefactError(str(path), f"is damaged ({reason})", "Remove it, and run `hqc tune` again.") from error


def write_table(path: Path, table: Table) -> None:
    """Writes a file whole or not at all.

    Raises:
        ArtefactError: if it cannot be written.
    """
    data = table.to_json()
    products = ",\n".join(f"  {json.dumps(product)}" for product in data.pop("products"))
    text = json.dumps(data, indent=1)[:-2] + f',\n "products": [\n{products}\n ]\n}}\n'
    write_file(path, text.encode())


def refuse_foreign_table(path: Path) -> None:
    """Refuses a file of somebody else's: `hqc tune` goes on with a table, and begins a damaged one anew.

    Raises:
        ArtefactError: if it is there and holds no table.
    """
    if not os.path.lexists(path):
        return
    try:
        with path.open("rb") as file:
            ours = re.match(rb'\s*{\s*"format": \d+,\s*"card":', file.read(200)) is not None
    except OSError as error:
        raise ArtefactError(str(path), f"cannot be read ({error.strerror})", "Give another --output.") from error
    if not ours:
        raise ArtefactError(str(path), "exists and is no table of tiles", "Give another --output.")


@cache
def shipped_table(card: Card) -> Table | None:
    """The table that ships for a card: its own, or that of one with the same architecture and multiprocessors."""
    tables = _shipped()
    twins = (t for t in tables if _chip(t.card) == _chip(card))
    return next((t for t in tables if t.card.slug == card.slug and _chip(t.card) == _chip(card)), next(twins, None))


def _chip(card: Card) -> tuple[tuple[int, int], int]:
    return card.capability, card.multiprocessors


@cache
def _shipped() -> tuple[Table, ...]:
    folder = resources.files("hqc.kernels") / "tuned"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return tuple(_parse(file.read_text(encoding="utf-8")) for file in files)


@cache
def kernels_version() -> str:
    """A hash of the kernels' sources: times of other ones are stale."""
    digest = hashlib.sha256()
    folder = resources.files("hqc.kernels") / "jit"
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".py")), key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def triton_version() -> str:
    """The version of triton that is installed, empty without one."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _parse(text: str) -> Table:
    """Raises ValueError, KeyError or TypeError for what no table is."""
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"format {data.get('format') if isinstance(data, dict) else None}, expected {FORMAT}")
    given = data["card"]
    major, minor = (_whole(n, "capability", least=0) for n in given["capability"])
    card = Card(
        str(given["name"]), (major, minor), _whole(given["multiprocessors"], "card"), shared_limit((major, minor))
    )
    made = {str(key): str(value) for key, value in data["made"].items()}
    return Table(card, {_product(entry): _tiles(entry["tiles"]) for entry in data["products"]}, made)


def _product(entry: Mapping[str, Any]) -> Product:
    for name, kind in _FIELDS.items():
        if type(entry[name]) is not kind or (kind is int and not 1 <= entry[name] < _LARGEST):
            raise ValueError(f"{name} is {entry[name]!r}")
    return Product(**{name: entry[name] for name in _FIELDS})


def _tiles(rows: Sequence[Sequence[Any]]) -> tuple[Timed, ...]:
    found = [_timed(*row) for row in rows]
    return tuple(sorted(found, key=lambda timed: timed.us))


def _timed(us: Any, *sizes: Any) -> Timed:
    if type(us) not in (int, float) or not 0 < us < math.inf:
        raise ValueError(f"a time is {us!r}")
    *powers, stages, splits = (_whole(size, "a tile") for size in sizes)
    if any(size & (size - 1) for size in powers) or max(*powers, stages, splits) > 1024:
        raise ValueError(f"a tile is {list(sizes)}")
    rows, outputs, channels, warps = powers
    if rows < 16 or outputs < 16 or channels < 32 or warps > 32 or stages > 16:
        raise ValueError(f"a tile is {list(sizes)}")
    return Timed(float(us), ProductTile(rows, outputs, channels, warps, stages, splits))


def _whole(value: Any, what: str, *, least: int = 1) -> int:
    if type(value) is not int or not least <= value < _LARGEST:
        raise ValueError(f"{what} has {value!r}")
    return value
