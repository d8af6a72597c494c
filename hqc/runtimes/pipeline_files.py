"""A pipeline's folder is checked before diffusers and transformers read it: it may come from a stranger.

    model_index.json     parts named like folders, their classes from diffusers, transformers and hqc alone
    */*config*.json      plain JSON of bounded size and depth that asks for no code and no model without bound

diffusers up to 0.37 imports a Python file that lies in the folder of a part whose library has its name.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hqc.configurations import CLASS_NAME, check_configuration
from hqc.errors import ArtefactError, RuntimeMissingError
from hqc.pipeline_parts import INDEX, PART, read_index

__all__ = ["check_pipeline", "read_index"]

OWN_LIBRARY = "hqc.models.ldm"
_OLDEST_DIFFUSERS = (0, 38)
_LIBRARY = re.compile(r"[a-z]\w{0,63}")


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
        elif isinstance(value, dict) and not _are_names(name, value):
            raise ArtefactError(str(folder / INDEX), f"has a mapping as {name[:40]!r}", "Check the folder.")
    for name, value in index.items():
        if isinstance(value, list) and value != [None, None] and (loaded is None or name in loaded):
            for path in sorted((folder / name).glob("*config*.json")):
                check_configuration(path)
    return index


def _are_names(name: str, value: dict[str, Any]) -> bool:
    """DiT's names of its classes: the one mapping that an index has."""
    return name == "id2label" and all(isinstance(text, str) for text in value.values())


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
    if not PART.fullmatch(name) or len(value) != 2:
        raise ArtefactError(where, f"has a part {name[:40]!r} that is not [library, class]", "Check the folder.")
    library, class_name = value
    if not used or (library is None and class_name is None):
        return
    texts = isinstance(library, str) and isinstance(class_name, str)
    if not texts or not CLASS_NAME.fullmatch(class_name) or not _is_known(library, class_name):
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
