"""The tensors of a checkpoint file by name: `.safetensors`, or `.ckpt` without running a pickle's code.

A `.ckpt` is read with `weights_only=True` and memory-mapped, so that only the weights that are used are ever read.
What training frameworks leave beside the weights (callbacks by class) is replaced by empty classes; every other global
in the pickle is refused by name before anything is loaded.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hqc.capture.averages import AVERAGED, flat_name
from hqc.errors import CaptureError

__all__ = ["read_checkpoint"]

# Where training keeps both sets apart instead of in the names.
_SETS, _AVERAGED_SETS = ("state_dict", "model", "unet"), ("state_dict_ema", "ema", "model_ema", "ema_state_dict")
_HARMLESS = re.compile(r"(pytorch_)?lightning(\.pytorch)?\.callbacks\.[\w.]+")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, memory-mapped where the format allows it.

    Raises:
        CaptureError: if the file is missing, truncated, holds code, or holds no named tensors.
    """
    if path.is_dir():
        raise CaptureError(str(path), "is a folder; expected a checkpoint file", "Give the file inside it.")
    if not path.is_file():
        raise CaptureError(str(path), "no such file", "Check the path.")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_ckpt(path)
    except OSError as error:
        raise CaptureError(str(path), f"cannot be read ({error.strerror or error})", "Check the file.") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_ckpt(path: Path) -> dict[str, Tensor]:
    zipped = _is_zipped(path)
    stubs = _stubs(path) if zipped else []
    try:
        with torch.serialization.safe_globals(stubs), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the file's age
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise _has_code(path, [found[1]]) from error
        raise _damaged(path, error) from error
    except OSError:
        raise
    except Exception as error:  # torch's readers raise whatever a damaged byte makes them raise
        raise _damaged(path, error) from error
    return _named_tensors(path, data)


def _is_zipped(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:  # a directory that names another disk
        raise _damaged(path, error) from error


def _stubs(path: Path) -> list[Any]:
    """Empty classes under the names of the callbacks that a checkpoint mentions.

    Raises:
        CaptureError: for any other global that torch does not load as a weight, and for compressed members, which
            cannot be mapped.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise CaptureError(str(path), "has compressed members, unlike what torch.save writes", "Save it again.")
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (OSError, CaptureError):
        raise
    except Exception as error:  # as in `_read_ckpt`
        raise _damaged(path, error) from error
    if code := sorted(name for name in unsafe if not _HARMLESS.fullmatch(name)):
        raise _has_code(path, code)
    return [(type(name.rpartition(".")[2], (), {}), name) for name in unsafe]


def _has_code(path: Path, names: list[str]) -> CaptureError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    names = [ascii(name)[1:-1][:160] for name in names[:3]]
    return CaptureError(
        str(path),
        f"is a pickle that calls {', '.join(names)}{more}, and hqc runs no code from a file",
        "If you trust it, load it in torch yourself and save its state_dict as .safetensors.",
    )


def _damaged(path: Path, error: Exception) -> CaptureError:
    what = " ".join(str(error).split())[:160] or type(error).__name__
    return CaptureError(str(path), f"is truncated or no checkpoint ({what})", "Copy or download the file again.")


def _named_tensors(path: Path, data: Any) -> dict[str, Tensor]:
    """The tensors of a state_dict, and those of its average as if one file had both."""
    state, average = data, None
    if isinstance(data, Mapping):
        average = next((data[key] for key in _AVERAGED_SETS if isinstance(data.get(key), Mapping)), None)
        sets = [data[key] for key in _SETS if key in data and (key == "state_dict" or isinstance(data[key], Mapping))]
        state = sets[0] if sets else data
    if not isinstance(state, Mapping):
        raise CaptureError(str(path), f"holds a {type(state).__name__}; expected a state_dict", "Give a checkpoint.")
    tensors = _tensors(state)
    if average is not None:
        tensors |= {AVERAGED + flat_name(name): tensor for name, tensor in _tensors(average).items()}
    if not tensors:
        raise CaptureError(str(path), "holds no named tensors", "Give a checkpoint with a state_dict.")
    return tensors


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
