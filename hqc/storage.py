"""Programs on disk: a folder of JSON, text and safetensors, written atomically, checked by hash, never unpickled.

    NAME.hqc/manifest.json        format version, stage, origin, inputs, sha256 and size of every file
    NAME.hqc/graph.json           the fx graph: nodes, operators, arguments, shapes
    NAME.hqc/weights.safetensors  tensors by fully qualified name
    NAME.hqc/plan.json            the quantisation plan
    NAME.hqc/history.json         one record a pass
    NAME.hqc/pipeline/            what surrounds the denoiser, in diffusers layout (optional)

torch's own `.pt2` archive is not used: `torch.export.load` unpickles and evaluates expressions from the file.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hqc.atomic import atomic_folder, is_artefact, refuse_existing, refuse_existing_file, refuse_nested
from hqc.checking import check_calls
from hqc.errors import ArtefactError, HqcError, MemoryShortError, PassError
from hqc.graph_json import graph_from_json, graph_to_json
from hqc.manifests import FORMAT_VERSION, check_manifest, read_json, refuse_links, write_manifest
from hqc.paths import StrPath
from hqc.pipeline_parts import pipeline_files
from hqc.plan import QuantPlan
from hqc.program import InputSpec, Origin, PassRecord, Program, Stage
from hqc.structure import site_problems
from hqc.styles.record import Style
from hqc.verify import verify

__all__ = [
    "FORMAT_VERSION",
    "atomic_folder",
    "check_manifest",
    "copy_pipeline",
    "is_artefact",
    "load_program",
    "pipeline_folder",
    "refuse_existing",
    "refuse_existing_file",
    "refuse_nested",
    "save_program",
    "write_manifest",
]


def pipeline_folder(artefact: Path) -> Path | None:
    """The diffusers-layout folder inside an artefact, if it has one."""
    folder = artefact / "pipeline"
    return folder if folder.is_dir() else None


def save_program(
    program: Program,
    folder: StrPath,
    *,
    force: bool = False,
    pipeline: StrPath | None = None,
    variant: str | None = None,
) -> None:
    """Writes NAME.hqc/; `pipeline` is a diffusers-layout folder whose parts (all but the denoiser) are copied in.

    variant: of the weights of those parts, where they have it.

    Raises:
        ArtefactError: if the folder exists (without `force`), lies inside `pipeline`, or cannot be written.
    """
    folder = Path(folder)
    if pipeline is not None:
        refuse_nested(folder, Path(pipeline))
    with atomic_folder(folder, force=force) as temporary:
        graph = {"nodes": graph_to_json(program.graph)}
        (temporary / "graph.json").write_text(json.dumps(graph, allow_nan=False) + "\n", encoding="utf-8")
        save_file(
            {k: v.detach().contiguous() for k, v in _untied(program.state).items()}, temporary / "weights.safetensors"
        )
        _dump(temporary / "plan.json", program.plan.to_dict())
        _dump(temporary / "history.json", [asdict(record) for record in program.history])
        if pipeline is not None:
            copy_pipeline(Path(pipeline), temporary / "pipeline", variant)
        write_manifest(
            temporary,
            "hqc-program",
            {
                "stage": str(program.stage),
                "origin": asdict(program.origin),
                "inputs": [asdict(spec) for spec in program.inputs],
                **({"loras": [style.to_dict() for style in program.styles]} if program.styles else {}),
            },
        )


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory are cloned: safetensors stores each name once."""
    seen: set[int] = set()
    out = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        shared = tensor.numel() > 0 and memory in seen
        seen.add(memory)
        out[name] = tensor.clone() if shared else tensor
    return out


def copy_pipeline(source: Path, target: Path, variant: str | None = None) -> None:
    """Copies the files that a pipeline consists of, without its denoiser; see `hqc.pipeline_parts`.

    Links are followed, but for those inside an artefact: the cache of the hub is made of them, and a user's own folder
    may be; an artefact of hqc has none. variant: of the weights.

    Raises:
        ArtefactError: for a link in the pipeline of an artefact, an index or a file that cannot be read.
    """
    if is_artefact(source.parent):
        refuse_links(source)
    for name, file in pipeline_files(source, variant).items():
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.open("rb").close()
        except OSError as error:
            raise ArtefactError(str(file), f"cannot be read ({error.strerror})", "Check the folder.") from error
        shutil.copyfile(file, copy)  # the contents alone: a mode of the source would stay with the copy


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _record(data: Any) -> PassRecord:
    missed = tuple((site, reason) for site, reason in data["missed"])
    # Programs of earlier versions have records without the sites that went.
    removed = tuple(data.get("removed", ()))
    record = PassRecord(data["text"], tuple(data["touched"]), missed, float(data["seconds"]), removed)
    texts = (record.text, *record.touched, *removed, *(part for pair in missed for part in pair))
    if not all(isinstance(text, str) for text in texts) or not math.isfinite(record.seconds):
        raise ValueError("a record of history.json has a field of the wrong type")
    return record


_PARTS = ("graph.json", "weights.safetensors", "plan.json", "history.json")


def load_program(folder: StrPath) -> Program:
    """Reads NAME.hqc/ after checking every hash.

    Raises:
        ArtefactError: if it is missing, damaged, of another version, or calls what a graph may not call.
    """
    folder = Path(folder)
    manifest = check_manifest(folder, "hqc-program")
    if unlisted := [name for name in _PARTS if name not in manifest["files"]]:
        raise ArtefactError(str(folder / "manifest.json"), f"does not list {unlisted[0]}", "Write it again.")
    try:
        graph = graph_from_json(read_json(folder / "graph.json")["nodes"])
        state = load_file(folder / "weights.safetensors")
        wanted = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        if missing := sorted(wanted - state.keys()):
            raise ValueError(f"weights {', '.join(missing[:3])} are missing")
        program = Program(
            graph=graph,
            state=state,
            inputs=tuple(InputSpec.from_dict(spec) for spec in manifest["inputs"]),
            stage=Stage(manifest["stage"]),
            plan=QuantPlan.from_dict(read_json(folder / "plan.json")),
            history=tuple(_record(r) for r in read_json(folder / "history.json")),
            origin=Origin.from_dict(manifest["origin"]),
            styles=tuple(Style.from_dict(style) for style in manifest.get("loras", ())),
        )
        verify(program, after="load")
        if problems := site_problems(program):
            raise ValueError("; ".join(problems))
        check_calls(program)
        return program
    except MemoryShortError:
        raise
    except (LookupError, ArithmeticError, *_DATA_ERRORS) as error:
        found = _first_words(error) if not isinstance(error, PassError) else error.found[:180]
        raise ArtefactError(str(folder), f"is not a program ({found})", "Write it again with `hqc trace`.") from error


_DATA_ERRORS = (TypeError, ValueError, AttributeError, RuntimeError, AssertionError, SafetensorError, HqcError)


def _first_words(error: Exception) -> str:
    """An error in part of a line: a file may hold texts of any length."""
    return " ".join(str(error).split())[:180] or type(error).__name__
