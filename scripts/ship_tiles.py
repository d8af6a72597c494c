"""Takes the products of a table of `hqc tune` into the one that ships for its card, hqc/kernels/tuned/CARD.json.

    python scripts/ship_tiles.py TILES.json

What was measured anew takes the place of what the shipped table held of the same product; the rest stays.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from hqc.kernels.tuned import Table, read_table, write_table

FOLDER = Path(__file__).resolve().parents[1] / "hqc" / "kernels" / "tuned"


def merged(shipped: Table | None, tuned: Table) -> Table:
    """Both, `tuned` first; `made` says how many products came from it and when."""
    if shipped is None:
        return tuned
    date = tuned.made.get("date", "an unknown date")
    note = f"{len(tuned.products)} products by hqc tune on {date}; the others: {shipped.made.get('method', 'unknown')}"
    made = {**shipped.made, **{name: value for name, value in tuned.made.items() if name != "kernels"}, "method": note}
    return replace(shipped, products={**shipped.products, **tuned.products}, made=made)


def main() -> None:
    """Reads both, writes the shipped one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path)
    tuned = read_table(parser.parse_args().tiles)
    path = FOLDER / f"{tuned.card.slug}.json"
    table = merged(read_table(path) if path.exists() else None, tuned)
    write_table(path, table)
    print(f"{path}: {len(table.products)} products")


if __name__ == "__main__":
    main()
