"""A program of a named architecture without the weights that its names decide: megabytes instead of gigabytes.

    OUTLINE/graph.json, plan.json       as in a program's folder
    OUTLINE/kept.safetensors            scales, tables, and whatever is not what its name says
    OUTLINE/seeded.json                 name → shape of the rest, drawn again when it is read

`arch:NAME` fills every parameter from a generator seeded with the parameter's name (see `hqc.capture.architectures`).
So a program can be made where there is memory and diffusers, and timed where there is a GPU and neither.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hqc.errors import ArtefactError
from hqc.graph_json import graph_from_json, graph_to_json
from hqc.plan import QuantPlan
from hqc.program import InputSpec, Origin, Program, Stage
from hqc.storage import atomic_folder, check_manifest, write_manifest
from hqc.verify import verify

__all__ = ["OUTLINE_KIND", "read_outline", "seeded_tensor", "write_outline"]

OUTLINE_KIND = "hqc-outline"
_FILES = ("graph.json", "plan.json", "kept.safetensors", "seeded.json")


def seeded_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """What `arch:NAME` fills a parameter of this name and shape with (norms are told by their one axis)."""
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    tensor = torch.empty(shape)
    if name.rpartition(".")[2] == "bias":
        return tensor.normal_(0, 0.02, generator=generator)
    if tensor.ndim == 1:
        return tensor.normal_(1, 0.1, generator=generator)
    return tensor.normal_(0, 1 / math.sqrt(max(tensor[0].numel(), 1)), generator=generator)


def write_outline(program: Program, folder: Path, *, force: bool = False) -> None:
    """Writes a program without the tensors that are what their names say; every one of those has been compared.

    Raises:
        ArtefactError: if the folder exists (without `force`) or cannot be written.
    """
    seeded = {name: list(t.shape) for name, t in program.state.items() if _is_seeded(name, t)}
    kept = {name: t.detach().contiguous() for name, t in program.state.items() if name not in seeded}
    with atomic_folder(folder, force=force) as temporary:
        graph = json.dumps({"nodes": graph_to_json(program.graph)}, allow_nan=False)
        (temporary / "graph.json").write_text(graph + "\n", encoding="utf-8")
        (temporary / "plan.json").write_text(json.dumps(program.plan.to_dict()) + "\n", encoding="utf-8")
        (temporary / "seeded.json").write_text(json.dumps(seeded) + "\n", encoding="utf-8")
        save_file(kept, temporary / "kept.safetensors")
        fields = {
            "stage": str(program.stage),
            "origin": asdict(program.origin),
            "inputs": [asdict(spec) for spec in program.inputs],
        }
        write_manifest(temporary, OUTLINE_KIND, fields)


def read_outline(folder: Path) -> Program:
    """The program with every tensor, equal to the one that was written but for its history.

    Raises:
        ArtefactError: if the folder is missing or damaged, or is no outline.
    """
    manifest = check_manifest(folder, OUTLINE_KIND)
    if missing := [name for name in _FILES if name not in manifest["files"]]:
        raise ArtefactError(str(folder), f"lists no {missing[0]}", "Write it again.")
    try:
        seeded = _json(folder / "seeded.json")
        state = load_file(folder / "kept.safetensors")
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a generator each: the order does not matter
            drawn = pool.map(seeded_tensor, seeded, map(tuple, seeded.values()))
            state |= zip(seeded, drawn, strict=True)
        program = Program(
            graph=graph_from_json(_json(folder / "graph.json")["nodes"]),
            state=state,
            inputs=tuple(InputSpec.from_dict(spec) for spec in manifest["inputs"]),
            stage=Stage(manifest["stage"]),
            plan=QuantPlan.from_dict(_json(folder / "plan.json")),
            origin=Origin(**manifest["origin"]),
        )
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(str(folder), f"is not an outline ({error})", "Write it again.") from error
    verify(program, after="read_outline")
    return program


def _is_seeded(name: str, tensor: Tensor) -> bool:
    if tensor.dtype != torch.float32 or name.rpartition(".")[2] not in ("weight", "bias"):
        return False
    return torch.equal(tensor, seeded_tensor(name, tuple(tensor.shape)))


def _json(path: Path):  # type: ignore[no-untyped-def]
    return json.loads(path.read_text(encoding="utf-8"))
