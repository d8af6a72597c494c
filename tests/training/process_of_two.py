"""What each of two processes does: trains from the command line, then from Python with a break in the middle.

Arguments: program, output of the command, work folder, a port for each joining. Says what the command printed.
"""

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import hqc
from hqc.api import finish_run
from hqc.cli import main
from hqc.processes import ALONE, Processes, joined
from hqc.recipes import RECIPES, Recipe
from hqc.storage import save_program
from hqc.training import GuidedNoise, QueueRelation, TemporalRelation

QUICK = "--n-steps 3 --calib-size 1 --steps 2 --batch-size 4 --recipe hq-dm --set attach_lora.rank=2"
SETTINGS: dict[str, Any] = {
    "sampler.num_inference_steps": 3,
    "sampler.guidance_scale": 1.5,
    "distil.updates": 5,
    "distil.batch_size": 4,
    "distil.checkpoint_every": 2,
    "distil.order": "mixed",
    "distil.own_share": 1.0,
    "distil.weighting": "effect",
    "calibrate_activations.samples": 1,
    "calibrate_activations.candidates": 10,
    "calibrate_weights.candidates": 10,
    "attach_lora.rank": 2,
}
RELATED = {
    **{key: value for key, value in SETTINGS.items() if key.partition(".")[0] in ("sampler", "attach_lora")},
    "distil.updates": 5,
    "distil.batch_size": 4,
    "distil.checkpoint_every": 2,
    "smooth.samples": 1,
    "mix_channel_bits.samples": 1,
    "calibrate_activations.samples": 1,
    "calibrate_activations.candidates": 10,
}
"""For `mpq-dm`, of which the fourth update is the first of a second trajectory."""


def related() -> Recipe:
    """`mpq-dm` with a queue besides: losses that see neighbouring steps."""
    recipe = RECIPES["mpq-dm"]
    distil = recipe.step("distil")
    losses = (GuidedNoise(), TemporalRelation(window=3), QueueRelation(queue=64, within=1, pixels=24))
    steps = tuple(replace(step, losses=losses) if step is distil else step for step in recipe.steps)
    return replace(recipe, steps=steps)


class Cut(Exception):
    """Somebody has killed the run."""


def trained(
    program: hqc.Program,
    work: Path | None = None,
    processes: Processes = ALONE,
    *,
    cut_after: int = 0,
    recipe: str | Recipe = "hq-dm",
    settings: dict[str, Any] = SETTINGS,
) -> hqc.Program:
    """In this process's share; resumed after it was cut."""

    def hear(update: Any) -> None:
        if update.step == cut_after:
            raise Cut

    options = {"work_dir": work, "processes": processes, "settings": settings}
    with contextlib.suppress(Cut):
        return hqc.qat(program, recipe, "w4a4", on_update=hear, **options)
    return hqc.qat(program, recipe, "w4a4", resume=True, **options)


def by_command(program: Path, output: Path, ports: list[str]) -> None:
    """As a launcher starts it; a batch that two processes do not divide is refused."""
    for options, ending, port in ((QUICK, "", ports[0]), (QUICK.replace("size 4", "size 3"), ".odd", ports[1])):
        os.environ["MASTER_PORT"] = port
        with contextlib.suppress(SystemExit):
            main(["qat", str(program), "-o", f"{output}{ending}", *options.split()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    program, output, work = map(Path, sys.argv[1:4])
    by_command(program, output, sys.argv[4:6])
    os.environ["MASTER_PORT"] = sys.argv[6]
    with joined() as processes:
        captured = hqc.load_program(program)
        for folder, more in ((work, {}), (work.with_name("related"), {"recipe": related(), "settings": RELATED})):
            result = trained(captured, folder, processes, cut_after=3, **more)
            if processes.first:
                save_program(result, folder.with_suffix(".hqc"))
                finish_run(folder)
