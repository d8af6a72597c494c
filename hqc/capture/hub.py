"""Hub ids as sources: `owner/name`, downloaded (or found in the local cache) and read as a folder.

Only configurations and safetensors are fetched, and of a pipeline only the folders that its index names.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from hqc.capture.averaged_folders import PARTS
from hqc.errors import CaptureError

__all__ = ["fetch_snapshot", "is_hub_id"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DENOISER = ("unet/*.safetensors", "transformer/*.safetensors", "*.safetensors")
_INDEX, _CONFIG = "model_index.json", "config.json"
_KINDS = ("*.json", "*.safetensors", "*.txt", "*.model")
# Other precisions and other averages of the same weights.
_VARIANTS = ("*.fp16*", "*.bf16*", "*non_ema*", "*.msgpack", "*openvino*", "*flax*")


def is_hub_id(source: str) -> bool:
    """Whether it has the form of a hub id, `owner/name`."""
    return _ID.fullmatch(source) is not None


def fetch_snapshot(name: str, revision: str | None, variant: str | None = None) -> tuple[Path, str]:
    """The local folder of a hub repository, and the commit that it is.

    Raises:
        CaptureError: naming the id, and whether it is missing, gated, without safetensors or out of reach.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        try:
            index = Path(hf_hub_download(name, _INDEX, revision=revision))
            patterns = _of_pipeline(index)
        except LocalEntryNotFoundError:
            # Out of reach: a bare model may be in the cache all the same.
            hf_hub_download(name, _CONFIG, revision=revision, local_files_only=True)
            patterns = [_CONFIG, "*.safetensors", "*.safetensors.index.json"]
        except EntryNotFoundError:
            hf_hub_download(name, _CONFIG, revision=revision)
            patterns = [_CONFIG, "*.safetensors", "*.safetensors.index.json"]
        left_out = [pattern for pattern in _VARIANTS if variant is None or variant not in pattern]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=left_out))
        if not any(folder.glob(weights) for weights in _DENOISER):  # in half precision alone
            parts = [f"{part}*.safetensors" for part in ("unet/", "transformer/", "")]
            snapshot_download(name, revision=revision, allow_patterns=parts, ignore_patterns=["*non_ema*"])
    except Exception as error:  # the hub's errors have no common base
        found, do = _explained(error, name, revision)
        raise CaptureError(f"source {name!r}", found, do) from error
    return folder, folder.name


def _of_pipeline(index: Path) -> list[str]:
    """The folders that a pipeline's index names, and the denoiser's averaged weights beside it."""
    data = json.loads(index.read_text(encoding="utf-8"))
    parts = [key for key, value in data.items() if isinstance(value, list) and re.fullmatch(r"\w+", key)]
    parts += [f"{part}_ema" for part in parts if part in PARTS]
    return [_INDEX, *(f"{part}/{kind}" for part in parts for kind in _KINDS)]


def _explained(error: Exception, name: str, revision: str | None) -> tuple[str, str]:
    """What went wrong, and what to do."""
    known: Mapping[str, tuple[str, str]] = {
        "GatedRepoError": ("is gated on the hub", "Accept its terms there and log in with `hf auth login`."),
        "RepositoryNotFoundError": (
            "is neither a local folder nor a repository that the hub shows",
            "Check the id; for a private one log in with `hf auth login`.",
        ),
        "RevisionNotFoundError": (f"has no revision {revision!r}", "Check --revision."),
        "RemoteEntryNotFoundError": (f"has neither {_INDEX} nor {_CONFIG}", "Give a diffusers pipeline or model."),
        "LocalEntryNotFoundError": _offline(name),
        "OfflineModeIsEnabled": _offline(name),
    }
    for kind in type(error).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__]
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"could not be fetched ({first})", "Check the connection, or give a local folder."


def _offline(name: str) -> tuple[str, str]:
    return (
        "is not a local folder, not in the local cache, and the hub cannot be reached",
        f"Connect, or run `hf download {name}` where there is a connection and give that folder.",
    )
