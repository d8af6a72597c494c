"""Programs on disk: a folder of JSON, text and safetensors, written atomically, checked by hash, never unpickled.

    NAME.hqc/manifest.json        format version, stage, origin, inputs, sha256 and size of every file
    NAME.hqc/graph.json           the fx graph: nodes, operators, arguments, shapes
    NAME.hqc/weights.safetensors  tensors by fully qualified name
    NAME.hqc/plan.json            the quantisation plan
    NAME.hqc/history.json         one record a pass
    NAME.hqc/pipeline/            what surrounds the denoiser, in diffusers layout (optional)

torch's own `.pt2` archive is not used: `torch.export.load` unpickles and evaluates expressions from the file.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hqc.checking import check_calls
from hqc.errors import ArtefactError, HqcError, MemoryShortError, PassError
from hqc.graph_json import graph_from_json, graph_to_json
from hqc.paths import StrPath
from hqc.plan import QuantPlan
from hqc.program import InputSpec, Origin, PassRecord, Program, Stage
from hqc.structure import site_problems
from hqc.verify import verify

__all__ = ["FORMAT_VERSION", "atomic_folder", "check_manifest", "load_program", "save_program", "write_manifest"]

FORMAT_VERSION = 1
_LARGEST_JSON = 256 * 2**20


@contextmanager
def atomic_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `target` when the block ends well: all of it or nothing.

    Raises:
        ArtefactError: if the target exists and `force` is not set, is not an artefact that hqc wrote, or cannot be
            written (permissions, a full disk).
    """
    refuse_existing(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ArtefactError(str(target.parent), f"cannot be written ({error})", "Choose a writable folder.") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync(path)
        _swap(temporary, target)
        _fsync(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise ArtefactError(
            str(target), f"could not be written ({error})", "Free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    """Puts the new folder in the place of the old one; the old one comes back if that fails."""
    if not target.exists() and not target.is_symlink():
        os.replace(temporary, target)
        return
    old = temporary.with_name(temporary.name + ".old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    if old.is_symlink():
        old.unlink()  # only the link is replaced, not the folder that it points to
    else:
        shutil.rmtree(old)


def refuse_existing(target: Path, *, force: bool) -> None:
    """The checks of `atomic_folder`, before long work starts.

    Raises:
        ArtefactError: if the target exists and may not be replaced.
    """
    if not (target.exists() or target.is_symlink()):
        return
    if not is_artefact(target):
        raise ArtefactError(str(target), "exists and was not written by hqc", "Choose another name.")
    if not force:
        raise ArtefactError(str(target), "already exists", "Give --force to replace it, or choose another name.")


def refuse_existing_file(target: Path, *, force: bool) -> None:
    """Refuses to overwrite a file without `force`.

    Raises:
        ArtefactError: if it exists.
    """
    if target.exists() and not force:
        raise ArtefactError(str(target), "already exists", "Give --force to replace it, or choose another name.")


def pipeline_folder(artefact: Path) -> Path | None:
    """The diffusers-layout folder inside an artefact, if it has one."""
    folder = artefact / "pipeline"
    return folder if folder.is_dir() else None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, kind: str, fields: Mapping[str, Any]) -> None:
    """Writes manifest.json over every other file in the folder: kind, version, sha256 and size of each."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": kind, "version": FORMAT_VERSION, **fields, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def is_artefact(folder: Path) -> bool:
    """Whether the folder holds a manifest that hqc wrote."""
    try:
        text = (folder / "manifest.json").read_text(encoding="utf-8")[:200]
    except (OSError, UnicodeDecodeError):
        return False
    return re.search(r'"format": "hqc-', text) is not None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ArtefactError(str(path), "is larger than any that hqc writes", "Write the artefact again.")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(str(path), f"cannot be read ({error})", "Write the artefact again.") from error


def check_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Reads manifest.json and checks every file that it names by size and hash.

    Raises:
        ArtefactError: if the folder is missing, of another kind or version, damaged, or names files outside itself.
    """
    if not folder.is_dir():
        raise ArtefactError(str(folder), "no such folder", "Check the path, or make one with `hqc trace`.")
    if not (folder / "manifest.json").is_file():
        raise ArtefactError(str(folder), "has no manifest.json", "Give a folder that hqc wrote.")
    manifest = _read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtefactError(
            str(folder), f"holds {_short(found)}; expected {kind!r}", "Give the other kind of artefact."
        )
    if manifest.get("version") != FORMAT_VERSION:
        raise ArtefactError(
            str(folder),
            f"has format version {_short(manifest.get('version'))}; this hqc reads {FORMAT_VERSION}",
            "Write it again with this version of hqc.",
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ArtefactError(str(folder / "manifest.json"), "lists no files", "Write the artefact again.")
    for name, expected in files.items():
        try:
            _check_file(folder, name, expected)
        except (OSError, ValueError) as error:
            found = f"cannot read {_short(name)} ({_first_words(error)[:80]})"
            raise ArtefactError(str(folder), found, "Do not use this artefact.") from error
    _refuse_links(folder / "pipeline")
    return manifest


def _refuse_links(folder: Path) -> None:
    """Refuses anything but files and folders: whoever copies or reads a link reads what lies elsewhere.

    Raises:
        ArtefactError: naming the link.
    """
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
            raise ArtefactError(str(path), "is a link, or no plain file", "Do not use this artefact.")


def _short(value: Any) -> str:
    """A value from a file in part of a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _check_file(folder: Path, name: str, expected: Any) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(expected, dict):
        raise ArtefactError(str(folder), f"names {_short(name)}, outside itself", "Do not use this artefact.")
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise ArtefactError(str(path), "is a link", "Do not use this artefact.")
    if not path.is_file():
        raise ArtefactError(str(path), "is missing", "Copy the whole folder, or write it again.")
    if path.stat().st_size != expected.get("size"):
        raise ArtefactError(
            str(path),
            f"is truncated or changed: {path.stat().st_size} bytes, the manifest says {_short(expected.get('size'))}",
            "Copy the whole folder again.",
        )
    if _sha256(path) != expected.get("sha256"):
        raise ArtefactError(str(path), "is damaged: its sha256 is not the manifest's", "Copy the folder again.")


def save_program(program: Program, folder: StrPath, *, force: bool = False, pipeline: StrPath | None = None) -> None:
    """Writes NAME.hqc/; `pipeline` is a diffusers-layout folder whose parts (all but the UNet) are copied in.

    Raises:
        ArtefactError: if the folder exists (without `force`) or cannot be written.
    """
    with atomic_folder(Path(folder), force=force) as temporary:
        graph = {"nodes": graph_to_json(program.graph)}
        (temporary / "graph.json").write_text(json.dumps(graph, allow_nan=False) + "\n", encoding="utf-8")
        save_file(
            {k: v.detach().contiguous() for k, v in _untied(program.state).items()}, temporary / "weights.safetensors"
        )
        _dump(temporary / "plan.json", program.plan.to_dict())
        _dump(temporary / "history.json", [asdict(record) for record in program.history])
        if pipeline is not None:
            copy_pipeline(Path(pipeline), temporary / "pipeline")
        write_manifest(
            temporary,
            "hqc-program",
            {
                "stage": str(program.stage),
                "origin": asdict(program.origin),
                "inputs": [asdict(spec) for spec in program.inputs],
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


def copy_pipeline(source: Path, target: Path) -> None:
    """Copies a diffusers-layout folder without its denoiser; links are followed, but for those inside an artefact.

    The cache of the hub is made of links, and a user's own folder may be; an artefact of hqc has none.

    Raises:
        ArtefactError: for a link in the pipeline of an artefact.
    """
    if is_artefact(source.parent):
        _refuse_links(source)
    shutil.copytree(
        source,
        target,
        ignore=shutil.ignore_patterns("unet", "transformer", "classifier", "*.png", "*.bin", "*.ckpt", "*.pt"),
    )


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
        graph = graph_from_json(_read_json(folder / "graph.json")["nodes"])
        state = load_file(folder / "weights.safetensors")
        wanted = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        if missing := sorted(wanted - state.keys()):
            raise ValueError(f"weights {', '.join(missing[:3])} are missing")
        program = Program(
            graph=graph,
            state=state,
            inputs=tuple(InputSpec.from_dict(spec) for spec in manifest["inputs"]),
            stage=Stage(manifest["stage"]),
            plan=QuantPlan.from_dict(_read_json(folder / "plan.json")),
            history=tuple(_record(r) for r in _read_json(folder / "history.json")),
            origin=Origin.from_dict(manifest["origin"]),
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
