"""Raw weights or their moving average, where a file has both: the average, unless the raw ones are asked for.

model_ema.diffusion_modelout2weight     original latent diffusion: the name below `model.`, without its dots
ema.conv_in.weight                      the same name, with them
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from hqc.errors import CaptureError

__all__ = ["AVERAGED", "Weights", "choose_weights", "flat_name"]

Weights = Literal["raw", "ema"]

RAW, AVERAGED = "model.", "model_ema."
_PREFIXES = (AVERAGED, "ema.")


def flat_name(name: str) -> str:
    """The name under which the average of a tensor is kept: below `model.`, without its dots."""
    return name.removeprefix(RAW).replace(".", "")


def choose_weights(
    path: Path, tensors: Mapping[str, Tensor], names: Sequence[str], wanted: Weights | None = None
) -> tuple[dict[str, Tensor], str]:
    """The tensors with one set of the denoiser's weights, and which: "model_ema" or "model".

    names: the denoiser's tensors as the raw set names them. wanted: None takes the average where there is one.

    Raises:
        CaptureError: if the set that is asked for is not there.
    """
    kept = {key: next((p for p in _PREFIXES if key.startswith(p)), None) for key in tensors}
    averages = {flat_name(key.removeprefix(prefix)): tensors[key] for key, prefix in kept.items() if prefix}
    others = {key: tensors[key] for key, prefix in kept.items() if not prefix}
    found = {name: averages[flat_name(name)] for name in names if flat_name(name) in averages}
    if wanted == "ema" and not found:
        raise CaptureError(str(path), "has no averaged weights (model_ema.…)", "Leave --weights ema out.")
    if wanted == "raw" and found and not others.keys() & set(names):
        raise CaptureError(str(path), "has averaged weights alone", "Leave --weights raw out.")
    if not found or wanted == "raw":
        return others, "model"
    return {key: tensor for key, tensor in others.items() if key not in found and key not in names} | found, "model_ema"
