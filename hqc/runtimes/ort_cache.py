"""A cache of models as ONNX Runtime has optimised them: a session opens without folding every weight again.

    CACHE/<key>/model.onnx, model.onnx.data     weights rotated and unpacked to int8, mapped from the file when opened
    key = sha256(the export's files, ONNX Runtime's version, the machine's instruction sets)

LDM-4 opens in 0.5 s instead of 4.2 and at the peak takes 0.5 GB instead of 1.8; the entry has twice the export's size.
An optimised model holds kernels chosen for one machine, hence the key; it is no artefact to give away.
"""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hqc.claims import claimed
from hqc.errors import ArtefactError
from hqc.export.model import DATA_FILE, MODEL_FILE
from hqc.export.ort_session import import_onnxruntime, open_session
from hqc.storage import atomic_folder, check_manifest, write_manifest

__all__ = ["CACHE_KIND", "cache_key", "optimised_model"]

CACHE_KIND = "hqc-optimised"


def cache_key(files: Mapping[str, Any], version: str, cpu: str) -> str:
    """The name of an entry. files: a manifest's names with size and sha256; cpu: `instruction_sets()`."""
    models = {name: files[name]["sha256"] for name in (MODEL_FILE, DATA_FILE) if name in files}
    return hashlib.sha256(json.dumps([models, version, cpu], sort_keys=True).encode()).hexdigest()[:32]


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What decides which kernels ONNX Runtime picks."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return " ".join([platform.machine(), *sorted(found[1].split() if found else [platform.processor()])])


def optimised_model(folder: Path, files: Mapping[str, Any], cache: Path) -> Path:
    """The optimised form of an export's model, made on the first call.

    folder: an export whose hashes have been checked; files: those of its manifest.

    Raises:
        ArtefactError: if the cache cannot be written, or onnxruntime refuses the model.
        RuntimeMissingError: if onnxruntime is not installed.
    """
    onnxruntime = import_onnxruntime()
    entry = cache / cache_key(files, onnxruntime.__version__, instruction_sets())
    if _intact(entry):
        return entry / MODEL_FILE
    with claimed(entry, force=True, wait=True):  # whoever makes it now makes it for both
        if _intact(entry):
            return entry / MODEL_FILE
        with atomic_folder(entry, force=True) as temporary:
            open_session(folder / MODEL_FILE, save_to=temporary / MODEL_FILE)
            write_manifest(temporary, CACHE_KIND, {"source": folder.name, "onnxruntime": onnxruntime.__version__})
    return entry / MODEL_FILE


def _intact(entry: Path) -> bool:
    """Whether an entry is there and whole; a damaged one is made again."""
    try:
        return entry.exists() and MODEL_FILE in check_manifest(entry, CACHE_KIND)["files"]
    except ArtefactError:
        return False
