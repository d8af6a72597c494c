"""Weights that are NaN or infinite: found before anything is made of them, by name."""

from collections.abc import Collection, Mapping

from torch import Tensor

from hqc.errors import CaptureError
from hqc.wording import listed

__all__ = ["require_finite"]


def require_finite(where: str, tensors: Mapping[str, Tensor], learnt: Collection[str], prefix: str = "") -> None:
    """Refuses NaN in any tensor, and infinity in the learnt ones: a mask may be infinite.

    prefix: what the names are given without.

    Raises:
        CaptureError: naming the tensors and the first place in the first.
    """
    damaged = [name for name, tensor in tensors.items() if not _finite(tensor, infinity=name not in learnt)]
    if not damaged:
        return
    tensor = tensors[damaged[0]]
    bad = tensor.isnan() if bool(tensor.isnan().any()) else ~tensor.isfinite()
    place, count = bad.nonzero()[0].tolist(), int(bad.sum())
    names = listed([name.removeprefix(prefix) for name in damaged])
    raise CaptureError(
        where,
        f"has weights that are NaN or infinite: {names} ({count} in the first, at {place})",
        "The file is damaged or was converted badly: take another copy.",
    )


def _finite(tensor: Tensor, *, infinity: bool) -> bool:
    """Whether there is no NaN, and no infinity unless it is allowed; without a copy of the tensor."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = (float(bound) for bound in tensor.aminmax())
    return low == low if infinity else float("-inf") < low <= high < float("inf")
