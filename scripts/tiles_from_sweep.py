"""Makes a table of tiles that ships, hqc/kernels/tuned/CARD.json, from a sweep over a model's products.

    python scripts/tiles_from_sweep.py SWEEP.json --date 2026-11-26

The sweep has for each product the shape of its codes, its window, the tiles that were tried with their times, and
optionally `usual`: the tile that the package chose then, with its time. Where two products are the same for the
kernels (a 1×1 convolution and a linear layer), the first is kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hqc.kernels.cards import Card, shared_limit
from hqc.kernels.products import Product, ProductTile
from hqc.kernels.tuned import Table, Timed, write_table

FOLDER = Path(__file__).resolve().parents[1] / "hqc" / "kernels" / "tuned"


def product_of(entry: dict[str, Any]) -> Product:
    """What a sweep's entry measured; strides are not in the sweep."""
    *places, channels = entry["codes"]
    rows = 1
    for size in places:
        rows *= size
    height, width = entry["kernel"]
    return Product(rows, entry["outputs"], channels, height * width, two_digits=entry["weight"] == "two")


def tiles_of(entry: dict[str, Any]) -> tuple[Timed, ...]:
    """Its tiles, from the quickest on."""
    found = dict[ProductTile, float]()
    for row in [*entry["tiles"], *([entry["usual"]] if "usual" in entry else [])]:
        tile = ProductTile(
            row["rows"], row["outputs"], row["channels"], row["warps"], row["stages"], row.get("splits", 1)
        )
        found[tile] = min(row["us"], found.get(tile, row["us"]))
    return tuple(sorted((Timed(us, tile) for tile, us in found.items()), key=lambda timed: timed.us))


def table_of(sweep: dict[str, Any], date: str) -> Table:
    """The table of a sweep."""
    capability = (sweep["capability"][0], sweep["capability"][1])
    card = Card(sweep["card"], capability, sweep["multiprocessors"], shared_limit(capability))
    products = dict[Product, tuple[Timed, ...]]()
    for entry in sweep["products"]:
        products.setdefault(product_of(entry), tiles_of(entry))
    made = {"date": date, "torch": sweep["torch"], "triton": sweep["triton"], "method": sweep["method"]}
    return Table(card, products, made)


def main() -> None:
    """Reads the sweep, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--date", required=True)
    options = parser.parse_args()
    table = table_of(json.loads(options.sweep.read_text(encoding="utf-8")), options.date)
    path = FOLDER / f"{table.card.slug}.json"
    write_table(path, table)
    print(f"wrote {path.name}: {len(table.products)} products")


if __name__ == "__main__":
    main()
