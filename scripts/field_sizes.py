"""How large the files of the whole field are: exports every recipe at every width, and adds their bytes to the figures.

    python scripts/field_sizes.py work/digits.hqc       fills `file_bytes` of docs/measurements/digits-field.json
    python scripts/field_sizes.py work/digits.hqc --work work/cells --bits w4a4 --recipes hqc,rtn

A size depends mostly on what a recipe does to the graph and on bits: programs of a comparison's work folder are taken
where they are there; others are made untrained, with one image and one update wherever a recipe asks for more. Of nine
that were made both ways eight were off by -0.6 to 0.4 %, and `mpq-dmv2`, whose binary codes follow the
calibration, by 2.5 %. Then `scripts/field_table.py` draws anew.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from field_table import DOCS, FIGURES

from hqc import api
from hqc.errors import ExportError
from hqc.evaluation.comparison.entries import Entry, find_entries
from hqc.export.model import onnx_from_program, save_model
from hqc.export.prepare import prepare
from hqc.program import Program
from hqc.recipes import Recipe
from hqc.recipes.plan_file import PlanFile
from hqc.storage import load_program, pipeline_folder

FEWEST = {"samples": 1, "timesteps": 1, "rows": 64, "updates": 1, "iterations": 1, "candidates": 2, "rounds": 1}
PLANS = DOCS / "measurements" / "plans"


def entry_of(name: str, bits: str) -> Entry:
    """A row's recipe; that of one with a plan is the plan of these bits."""
    recipe, has_plan, plan = name.partition("@")
    return find_entries(f"{recipe}@{PLANS / bits / plan}.yaml" if has_plan else name)[0]


def quick(recipe: Recipe) -> Recipe:
    """Untrained, with as little calibration as there can be."""
    return replace(recipe, steps=tuple(map(_shortened, recipe.untrained().steps)))


def unranked(plan: PlanFile) -> PlanFile:
    """Without ranks of LoRAs, which an untrained recipe has none of."""
    return replace(plan, rules=tuple(replace(rule, lora_rank=None) for rule in plan.rules))


def _shortened(step: Any) -> Any:
    own = {field.name: getattr(step, field.name) for field in fields(step)}
    fewer = {name: least for name, least in FEWEST.items() if isinstance(own.get(name), int) and own[name] > least}
    return replace(step, **fewer)


def program_of(entry: Entry, bits: str, source: Path, folders: Sequence[Path]) -> Program:
    """Quantised: what a comparison made, of any seed, or what is made quickly."""
    found = [path for folder in folders for path in sorted(folder.glob(f"{bits}-{entry.slug}-[0-9].hqc"))]
    if found:
        return load_program(found[0])
    program = load_program(source)
    task = api.task_of(program, folder=pipeline_folder(source))
    return api.quantise(program, quick(entry.recipe), bits, task=task, plan=unranked(entry.plan))


def file_bytes(program: Program) -> int | None:
    """Of the export for ONNX Runtime as a sampler calls it; None where that takes no such program."""
    try:
        prepared = prepare(program, "onnxruntime")
    except ExportError:
        return None
    model, _ = onnx_from_program(prepared, "onnxruntime", 21, one_timestep=True)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        return sum(path.stat().st_size for path in Path(folder).glob("model.onnx*"))


def main() -> None:
    """Exports, adds, says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="digits, captured: `hqc trace digits -o work/digits.hqc`")
    parser.add_argument("--bits", default="", help="those alone, as w4a4,w8a8")
    parser.add_argument("--recipes", default="", help="those alone, by the names in the table")
    parser.add_argument("--work", type=Path, nargs="+", default=[], help="work folders of `hqc compare-recipes`")
    options = parser.parse_args()
    found = json.loads(FIGURES.read_text(encoding="utf-8"))
    widths, names = (set(filter(None, text.split(","))) for text in (options.bits, options.recipes))
    for row in found["rows"]:
        bits, name = row["bits"], row["recipe"]
        if (widths and bits not in widths) or (names and name not in names):
            continue
        size = file_bytes(program_of(entry_of(name, bits), bits, options.program, options.work))
        print(f"{bits} {name}: {size}", flush=True)
        for cell in row["cells"].values():
            cell["file_bytes"] = size
        FIGURES.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
