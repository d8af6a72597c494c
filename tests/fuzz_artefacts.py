"""One small artefact of every kind and of several models, for command lines at random to take."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import denoisers
import tiny_pipeline
import zoo

from hqc import api
from hqc.capture import trace
from hqc.export import export_program
from hqc.program import Program
from hqc.sampling import synthetic_task
from hqc.storage import save_program

__all__ = ["make_artefacts"]

MODULE = """
import torch


class Net(torch.nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

    def forward(self, sample, timestep):
        return self.layer(sample) * timestep[:, None]


def build():
    torch.manual_seed(1)
    return Net(), {"sample": torch.randn(2, 32), "timestep": torch.zeros(2)}


def breaks():
    raise KeyError("x" * 1000)


def nothing():
    return None


def integers():
    return Net(), {"sample": torch.zeros(2, 32, dtype=torch.int64), "timestep": torch.zeros(2)}
"""


def _quantised(program: Program, recipe: str, pipeline: Path | None, *, bits: str = "w4a4") -> Program:
    found = api.recipe_of(recipe, {"sampler.num_inference_steps": 2, "calibrate_activations.samples": 1})
    if found.kind == "qat":
        found = found.having("distil", batch_size=1, updates=1)
    task = synthetic_task(program) if pipeline is None else api.task_of(program, folder=pipeline)
    return api.quantise(program, found, bits, task=task)


def make_artefacts(work: Path) -> SimpleNamespace:
    """Folders by kind: `sources` for trace, `programs` at every stage, `exports` for every target, `others`."""
    digits = tiny_pipeline.save_tiny_pipeline(work / "pipeline")
    plain = shutil.copytree(tiny_pipeline.saved_pipeline("ddpm"), work / "ddpm")
    (work / "mine.py").write_text(MODULE, encoding="utf-8")
    captured = {
        "labelled": (tiny_pipeline.traced_pipeline("classes"), digits),
        "plain": (tiny_pipeline.traced_pipeline("ddpm"), plain),
        "text": (denoisers.captured_denoiser("sd15"), None),
        "patches": (denoisers.captured_denoiser("dit"), None),
        "module": (trace(zoo.ZOO["two_sites"]()), None),
    }
    programs, exports = [], []
    for name, (program, pipeline) in captured.items():
        save_program(program, work / f"{name}.hqc", pipeline=pipeline)
        programs.append(f"{name}.hqc")
    for name, recipe in (("labelled", "rtn"), ("labelled", "hq-dm"), ("plain", "rtn"), ("text", "hq-dm")):
        program, pipeline = captured[name]
        made = _quantised(program, recipe, pipeline)
        save_program(made, work / f"{name}-{recipe}.hqc", pipeline=pipeline)
        programs.append(f"{name}-{recipe}.hqc")
        for target in ("onnxruntime", "portable", "tensorrt") if (name, recipe) == ("labelled", "hq-dm") else ():
            export_program(made, target, work / target, pipeline=pipeline)
            exports.append(target)
    export_program(captured["plain"][0], "onnxruntime", work / "float", pipeline=plain)
    shutil.copytree(work / "labelled.hqc", work / "damaged.hqc")
    (work / "damaged.hqc" / "graph.json").write_text("{}", encoding="utf-8")
    (work / "empty").mkdir()
    (work / "words.txt").write_text("a cat\nb\n", encoding="utf-8")
    (work / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    return SimpleNamespace(
        work=work,
        sources=["pipeline", "ddpm/unet", "ddpm", "mine:build", "mine:breaks", "mine:nothing", "mine:integers"],
        programs=programs,
        exports=[*exports, "float"],
        others=["damaged.hqc", "empty", "words.txt", "not-there", "pipeline", ".", "", "os:getcwd", "\x1b[31m", "é"],
        texts=["words.txt", "bytes.txt", "not-there", "empty"],
    )
