"""What an engine depends on, as one key; and the digests that go into it.

key = sha256(JSON of: ONNX digest, builder and its version, hqc's version, compute capability, options with the
             profile, plugin digest)
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hqc import __version__
from hqc.engines.architectures import Capability
from hqc.engines.options import BuildOptions
from hqc.errors import ArtefactError

__all__ = ["PLUGINS", "engine_key", "onnx_digest", "plugins_digest"]

PLUGINS = "plugins/"


def engine_key(
    *,
    onnx: str,
    builder: str,
    builder_version: str,
    compute_capability: Capability,
    options: BuildOptions,
    plugins: str = "",
) -> str:
    """A name for the engine that these give: the same for the same, another if anything differs.

    onnx: `onnx_digest`; plugins: `plugins_digest`, empty for a model without plugins.
    """
    parts = {
        "onnx": onnx,
        "builder": builder,
        "builder_version": builder_version,
        "hqc": __version__,
        "compute_capability": list(compute_capability),
        "options": options.to_dict(),
        "plugins": plugins,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def onnx_digest(files: Mapping[str, Any], *names: str) -> str:
    """One digest over the model and its external data, from the hashes that the manifest lists.

    Raises:
        ArtefactError: if the manifest does not list one of them.
    """
    if missing := [name for name in names if name not in files]:
        raise ArtefactError("manifest.json", f"does not list {missing[0]}", "Export the program again.")
    return _digest({name: files[name]["sha256"] for name in names})


def plugins_digest(files: Mapping[str, Any]) -> str:
    """One digest over all that lies in plugins/; empty if nothing does."""
    found = {name: entry["sha256"] for name, entry in files.items() if name.startswith(PLUGINS)}
    return _digest(found) if found else ""


def _digest(hashes: Mapping[str, str]) -> str:
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()
