"""Configurations of diffusers and transformers from elsewhere: plain JSON, of bounded size, that asks for no code."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hqc.errors import ArtefactError

__all__ = ["CLASS_NAME", "check_configuration", "read_configuration"]

_LARGEST_FILE = 2**24
_DEEPEST = 16
CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9_]{0,99}")
# Keys with which a configuration asks for code of its own.
_CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "custom_revision")
# Numbers that say how many layers, channels or steps are built, by how their names end.
_COUNTS = re.compile(r".*(layers|layers_per_block|num_\w*|\w*_channels|\w*_size|dim|depth)")
_LARGEST_COUNT = 2**20
_LAYERS = re.compile(r".*(num_\w*layers|layers_per_block|num_\w*blocks|depth)")
_MOST_LAYERS = 1024
_MOST_ENTRIES = 2**16
# Where infinity means "no bound": lambda_min_clipped of DPM-Solver is -inf unless it is set.
_BOUNDS = re.compile(r"\w*(min|max|clip)\w*")


def check_configuration(path: Path) -> None:
    """Refuses a configuration that asks for code, or for a model that has no bounds.

    Raises:
        ArtefactError: naming the file and the key.
    """
    for key, value in _entries(read_configuration(path)):
        problem = _entry_problem(key, value)
        if problem:
            raise ArtefactError(str(path), problem, "Do not use it.")


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
    if key == "_class_name" and not (isinstance(value, str) and CLASS_NAME.fullmatch(value)):
        return f"names the class {str(value)[:40]!r}"
    if isinstance(value, list) and len(value) > _MOST_ENTRIES:
        return f"has {len(value)} entries in {key[:40]!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if isinstance(value, float):
        endless = math.isinf(value) and _BOUNDS.fullmatch(key)
        return "" if math.isfinite(value) or endless else f"has {value} as {key[:40]!r}"
    bound = _MOST_LAYERS if _LAYERS.fullmatch(key) else _LARGEST_COUNT if _COUNTS.fullmatch(key) else None
    if bound is not None and not -1 <= value <= bound:
        return f"has {str(value)[:20]} as {key[:40]!r}; expected at most {bound}"
    return ""


def read_configuration(path: Path) -> dict[str, Any]:
    """A JSON file with a mapping of bounded size and depth.

    Raises:
        ArtefactError: if it cannot be read, or is none.
    """
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
