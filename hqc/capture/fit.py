"""Whether stored weights are those of a diffusers module: names and shapes, without reading the data."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture.matching import Piece, check_fit
from hqc.errors import CaptureError

__all__ = ["check_folder", "check_module", "choose_variant", "empty_module", "read_shapes", "variants"]

_WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors")
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


def variants(folder: Path) -> set[str | None]:
    """The variants of the weights that a folder has; None stands for those without a name."""
    return {match["variant"] for path in folder.glob("*.safetensors") if (match := _WEIGHTS.fullmatch(path.name))}


def choose_variant(folder: Path, wanted: str | None) -> str | None:
    """The variant of a folder's weights to read (fp16, non_ema), None for the ones without a name.

    wanted: None takes the ones without a name, else the only variant there is.

    Raises:
        CaptureError: if it is not there, several are and none is the plain one, or all weights are pickles.
    """
    found = variants(folder)
    named = sorted(variant for variant in found if variant is not None)
    if wanted is not None and wanted not in named:
        there = f"it has {', '.join(named)}" if named else "it has no variant"
        raise CaptureError(str(folder), f"has no safetensors weights of variant {wanted}; {there}", "Check --variant.")
    if wanted is not None or None in found:
        return wanted
    if len(named) > 1:
        raise CaptureError(str(folder), f"has its weights as {', '.join(named)} only", f"Give --variant {named[0]}.")
    if named:
        return named[0]
    if pickled := sorted(folder.glob("*.bin")):
        raise CaptureError(
            str(folder),
            f"has its weights as {pickled[0].name} only, a pickle; hqc reads safetensors",
            "Convert them: load the model in diffusers and save_pretrained() it.",
        )
    return None


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


def check_folder(folder: Path, module: nn.Module, variant: str | None = None) -> None:
    """The same of the folder of a diffusers model, if it has safetensors files.

    Raises:
        CaptureError: if the weights do not fit, or a file cannot be read.
    """
    named = [(path, _WEIGHTS.fullmatch(path.name)) for path in sorted(folder.glob("*.safetensors"))]
    tensors = read_shapes(path for path, match in named if match and match["variant"] == variant)
    if not tensors:
        return
    renamed = {re.sub(rf"\.({'|'.join(_EARLY)})\.(?=weight$|bias$)", _renamed, name): t for name, t in tensors.items()}
    check_module(folder, folder / "config.json", module, renamed)


def _renamed(found: re.Match[str]) -> str:
    return f".{_EARLY[found[1]]}."
