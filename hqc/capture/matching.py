"""Which tensor of a checkpoint fills which parameter, and everything that does not fit, said at once."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hqc.errors import CaptureError

__all__ = ["Piece", "check_fit", "identity"]

_LISTED = 3
_LONGEST = 160
_WEIGHTS = ("model.", "first_stage_model.", "cond_stage_model.")
# Training leaves these: the loss of the autoencoder (a discriminator, LPIPS).
_IGNORED = ("first_stage_model.loss.", "loss.")


def identity(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Piece:
    """Where a parameter comes from: the tensor's name and shape in the checkpoint, and what is taken of it."""

    key: str
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor] = identity


def check_fit(path: Path, config: Path, pieces: Sequence[Piece], tensors: Mapping[str, Tensor]) -> None:
    """Checks that the checkpoint has every tensor that the configuration asks for, in its shape, and no other weight.

    Raises:
        CaptureError: with how many are missing, superfluous and of another shape, the first of each, and for what is
            missing the nearest name that is there.
    """
    wanted = {piece.key: piece.shape for piece in pieces}
    missing = [key for key in wanted if key not in tensors]
    extra = [key for key in tensors if key not in wanted and _is_weight(key)]
    wrong = [key for key, shape in wanted.items() if key in tensors and tuple(tensors[key].shape) != shape]
    strange = [key for key in wanted if key in tensors and not tensors[key].is_floating_point() and key not in wrong]
    parts = [
        _listed("missing", missing, lambda key: _nearest(key, extra)),
        _listed("not in the configuration", extra, lambda key: ""),
        _listed("of another shape", wrong, lambda key: f" {list(tensors[key].shape)}, expected {list(wanted[key])}"),
        _listed("no floating-point tensor", strange, lambda key: f" {tensors[key].dtype}"),
    ]
    if found := "; ".join(part for part in parts if part):
        raise CaptureError(
            str(path),
            f"does not fit {config}: {found}",
            "Give the configuration that belongs to it.",
            lists=True,
        )


def _is_weight(key: str) -> bool:
    """Whether a key holds a weight: schedules and counters lie at the top level, without a dot."""
    return "." in key and not key.startswith(_IGNORED) and not key.startswith("model_ema.")


def _listed(what: str, keys: Sequence[str], note: Callable[[str], str]) -> str:
    if not keys:
        return ""
    shown = ", ".join(_printed(key) + note(key) for key in keys[:_LISTED])
    more = f" … ({len(keys) - _LISTED} more)" if len(keys) > _LISTED else ""
    return f"{len(keys)} {'key' if len(keys) == 1 else 'keys'} {what}: {shown}{more}"


def _nearest(key: str, candidates: Sequence[str]) -> str:
    short = [name for name in candidates[:2000] if len(name) <= _LONGEST]
    near = difflib.get_close_matches(key, short, n=1, cutoff=0.7)
    return f" (nearest: {_printed(near[0])})" if near else ""


def _printed(key: str) -> str:
    """A name from a file as it may go to a terminal: short, and without control characters."""
    text = key if key.isprintable() else ascii(key)[1:-1]
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
