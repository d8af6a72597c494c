"""Whether stored weights are those of a diffusers module: names and shapes, without reading the data."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture.matching import Piece, check_fit
from hqc.errors import CaptureError

__all__ = ["check_folder", "check_module", "empty_module", "read_shapes"]

_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")
# diffusers renames these of early attention blocks itself.
_EARLY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_shapes(paths: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files by name, on the meta device: shapes without data.

    Raises:
        CaptureError: if a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CaptureError(str(path), f"is not a safetensors file ({error})", "Check the file.") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def empty_module(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """The module that a configuration describes, without weights."""
    import diffusers

    with torch.device("meta"):
        module: nn.Module = getattr(diffusers, kind).from_config(dict(config))
    return module


def check_module(where: Path, config: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors that are not the module's, all differences in one line.

    Raises:
        CaptureError: see `check_fit`.
    """
    pieces = [Piece(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]
    check_fit(where, config, pieces, tensors)


def check_folder(folder: Path, module: nn.Module) -> None:
    """The same of the folder of a diffusers model, if it has safetensors files.

    Raises:
        CaptureError: if the weights do not fit, or a file cannot be read.
    """
    tensors = read_shapes(path for path in sorted(folder.glob("*.safetensors")) if _WEIGHTS.fullmatch(path.name))
    if not tensors:
        return
    named = {re.sub(rf"\.({'|'.join(_EARLY)})\.(?=weight$|bias$)", _renamed, name): t for name, t in tensors.items()}
    check_module(folder, folder / "config.json", module, named)


def _renamed(found: re.Match[str]) -> str:
    return f".{_EARLY[found[1]]}."
