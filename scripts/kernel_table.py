"""Compiles the kernels' variants for every architecture, without a GPU; prints the table, writes docs/measurements.

    python scripts/kernel_table.py                 docs/measurements/kernels.json and the table
    python scripts/kernel_table.py --arch sm_90    one architecture, printed only

A cell: the int8 matrix instruction in the PTX, registers a thread, bytes spilled if any; last, dynamic shared memory.
"""

import argparse
import json
from pathlib import Path

from hqc.kernels.compile import ARCHITECTURES
from hqc.kernels.variants import rows, table

RESULT = Path(__file__).resolve().parents[1] / "docs" / "measurements" / "kernels.json"


def main() -> None:
    """Prints the table, and writes it if it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, help="one architecture instead of all; nothing is written")
    options = parser.parse_args()
    found = rows([options.arch] if options.arch else ARCHITECTURES)
    print(table(found))
    if options.arch is None:
        import triton

        data = {"triton": triton.__version__, "kernels": found}
        RESULT.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
