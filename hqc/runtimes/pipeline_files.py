"""A pipeline's folder is checked before diffusers and transformers read it: it may come from a stranger.

    model_index.json     parts named like folders, their classes from diffusers, transformers and hqc alone
    */*config*.json      plain JSON of bounded size and depth that asks for no code and no model without bound

diffusers up to 0.37 imports a Python file that lies in the folder of a part whose library has its name.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hqc.errors import ArtefactError, RuntimeMissingError

__all__ = ["check_pipeline", "read_index"]

INDEX = "model_index.json"
OWN_LIBRARY = "hqc.models.ldm"
_OLDEST_DIFFUSERS = (0, 38)
_LARGEST_FILE = 2**20
_DEEPEST = 16
_PART = re.compile(r"[A-Za-z]\w{0,63}")
_LIBRARY = re.compile(r"[a-z]\w{0,63}")
_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]{0,99}")
# Keys with which a configuration asks for code of its own.
_CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "custom_revision")
# Numbers that say how many layers, channels or steps are built, by how their names end.
_COUNTS = re.compile(r".*(layers|layers_per_block|num_\w*|\w*_channels|\w*_size|dim|depth)")
_LARGEST_COUNT = 2**20
_LAYERS = re.compile(r".*(num_\w*layers|layers_per_block|num_\w*blocks|depth)")
_MOST_LAYERS = 1024
_MOST_ENTRIES = 2**16


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json, with a class.

    Raises:
        ArtefactError: if it cannot be read, or is no index.
    """
    index = _read(folder / INDEX)
    name = index.get("_class_name")
    if not isinstance(name, str) or not _CLASS.fullmatch(name):
        raise ArtefactError(str(folder / INDEX), f"names the class {str(name)[:40]!r}", "Check the folder.")
    return index


def check_pipeline(folder: Path, loaded: Collection[str] | None = None) -> dict[str, Any]:
    """The index of a folder whose parts diffusers may load.

    loaded: the parts that will be; None for all but the denoiser.

    Raises:
        ArtefactError: naming the file, if a part is not what diffusers, transformers or hqc have, or a configuration
            asks for code or has no bounds. RuntimeMissingError: if diffusers is too old to be trusted with a folder.
    """
    _require_diffusers()
    index = read_index(folder)
    for name, value in index.items():
        if isinstance(value, list):
            _check_part(folder, name, value, used=loaded is None or name in loaded)
        elif isinstance(value, dict):
            raise ArtefactError(str(folder / INDEX), f"has a mapping as {name[:40]!r}", "Check the folder.")
    for name, value in index.items():
        if isinstance(value, list) and value != [None, None] and (loaded is None or name in loaded):
            for path in sorted((folder / name).glob("*config*.json")):
                _check_config(path)
    return index


def _require_diffusers() -> None:
    import diffusers

    found = tuple(int(part) for part in re.findall(r"\d+", diffusers.__version__)[:2])
    if found < _OLDEST_DIFFUSERS:
        oldest = ".".join(map(str, _OLDEST_DIFFUSERS))
        raise RuntimeMissingError(
            f"diffusers {diffusers.__version__}",
            f"runs code that lies in a pipeline's folder; expected {oldest} or later",
            f"Install diffusers>={oldest}.",
        )


def _check_part(folder: Path, name: str, value: list[Any], *, used: bool) -> None:
    where = str(folder / INDEX)
    if not _PART.fullmatch(name) or len(value) != 2:
        raise ArtefactError(where, f"has a part {name[:40]!r} that is not [library, class]", "Check the folder.")
    library, class_name = value
    if not used or (library is None and class_name is None):
        return
    texts = isinstance(library, str) and isinstance(class_name, str)
    if not texts or not _CLASS.fullmatch(class_name) or not _is_known(library, class_name):
        raise ArtefactError(
            where,
            f"its {name} is {str(library)[:40]}.{str(class_name)[:40]}; expected a class of diffusers, transformers or "
            "hqc, and no code from a folder",
            "Do not use this folder.",
        )
    if (folder / name).exists() and not (folder / name).is_dir():
        raise ArtefactError(str(folder / name), "is no folder", "Check the folder.")


def _is_known(library: str, class_name: str) -> bool:
    """Whether a library is one of those, and has the class; transformers' former names are left to diffusers."""
    import diffusers
    from diffusers import pipelines

    if library == OWN_LIBRARY:
        import hqc.models.ldm as own

        return class_name in own.__all__
    if library == "diffusers":
        return class_name in dir(diffusers)
    if library == "transformers":
        return not class_name.startswith("Auto")
    return _LIBRARY.fullmatch(library) is not None and library in dir(pipelines)


def _check_config(path: Path) -> None:
    for key, value in _entries(_read(path)):
        problem = _entry_problem(key, value)
        if problem:
            raise ArtefactError(str(path), problem, "Do not use this folder.")


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with the key that it stands under, at any depth."""
    yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _entries(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, key)


def _entry_problem(key: str, value: Any) -> str:
    if key in _CODE and value not in (None, False, {}, [], ""):
        return f"asks for code of its own ({key})"
    if key == "_class_name" and not (isinstance(value, str) and _CLASS.fullmatch(value)):
        return f"names the class {str(value)[:40]!r}"
    if isinstance(value, list) and len(value) > _MOST_ENTRIES:
        return f"has {len(value)} entries in {key[:40]!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"has {value} as {key[:40]!r}"
    bound = _MOST_LAYERS if _LAYERS.fullmatch(key) else _LARGEST_COUNT if _COUNTS.fullmatch(key) else None
    if bound is not None and not -1 <= value <= bound:
        return f"has {str(value)[:20]} as {key[:40]!r}; expected at most {bound}"
    return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it has more than {_LARGEST_FILE} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"it is a {type(data).__name__}")
        if _depth(data) > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
    except (OSError, ValueError, RecursionError) as error:
        found = " ".join(str(error).split())[:120]
        raise ArtefactError(str(path), f"is no configuration ({found})", "Check the folder.") from error
    return data


def _depth(value: Any, depth: int = 1) -> int:
    if depth > _DEEPEST or not isinstance(value, (dict, list)):
        return depth
    inner: Mapping[str, Any] | list[Any] = value
    return max((_depth(v, depth + 1) for v in (inner.values() if isinstance(inner, dict) else inner)), default=depth)
