"""What the launchers refuse, in the words of the error tree: where, what was found and expected, what to do."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from hqc.errors import KernelError, RuntimeMissingError

__all__ = ["check_devices", "check_rows", "check_tensor", "check_total", "float_name", "require_triton", "row_pitch"]

FLOAT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def check_tensor(
    where: str, name: str, tensor: Tensor, *, dtype: torch.dtype | Sequence[torch.dtype], shape: Sequence[int | None]
) -> None:
    """Refuses another dtype, another shape (None: any size), or a tensor that is not contiguous.

    Raises:
        KernelError: naming the tensor, what was found and what was expected.
    """
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise KernelError(where, f"{name} is {found}, expected {wanted}", "Convert it before the call.")
    matches = tensor.ndim == len(shape) and all(w is None or w == d for d, w in zip(tensor.shape, shape, strict=True))
    if not matches:
        wanted = "×".join("any" if d is None else str(d) for d in shape)
        found = "×".join(map(str, tensor.shape)) or "a scalar"
        raise KernelError(where, f"{name} has shape {found}, expected {wanted}", "Check the layer's sizes.")
    if not tensor.is_contiguous():
        raise KernelError(where, f"{name} has strides {tensor.stride()}, expected contiguous", "Call .contiguous().")


def check_rows(where: str, name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    """Refuses what is not a float matrix of this shape with contiguous rows; the rows may lie apart.

    Raises:
        KernelError: naming the tensor, what was found and what was expected.
    """
    if tensor.dtype not in FLOAT_NAMES:
        raise KernelError(where, f"{name} is {tensor.dtype}, expected a float", "Convert it before the call.")
    if tuple(tensor.shape) != shape or tensor.stride(-1) != 1:
        found = f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        raise KernelError(where, f"{found}, expected {shape} with contiguous rows", "Check the layer's sizes.")


def row_pitch(x: Tensor) -> int:
    """Numbers between the starts of the rows of x […, C], where all lie one pitch apart and are whole; else 0."""
    if x.ndim < 2 or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return 0
    pitch, expected = 0, 0
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if pitch and stride != expected:
            return 0
        pitch = pitch or stride
        expected = stride * size
    return pitch or x.shape[-1]


def check_total(where: str, **tensors: Tensor) -> None:
    """Refuses tensors of 2^31 elements and more: offsets are 32-bit.

    Raises:
        KernelError: naming the first tensor that is too large.
    """
    for name, tensor in tensors.items():
        if tensor.numel() >= 2**31:
            raise KernelError(where, f"{name} has {tensor.numel()} elements, expected below 2^31", "Split the batch.")


def float_name(where: str, dtype: torch.dtype) -> str:
    """triton's name of a floating dtype.

    Raises:
        KernelError: if the kernels do not compute in it.
    """
    if dtype not in FLOAT_NAMES:
        raise KernelError(where, f"the dtype is {dtype}, expected float16, bfloat16 or float32", "Choose one of those.")
    return FLOAT_NAMES[dtype]


def check_devices(where: str, first: Tensor, *others: Tensor | None) -> None:
    """Refuses tensors of several devices, and a device that the kernels cannot run on here.

    Raises:
        KernelError: naming the devices.
        RuntimeMissingError: if triton is missing.
    """
    found = {str(t.device) for t in (first, *others) if t is not None}
    if len(found) > 1:
        raise KernelError(where, f"the tensors are on {', '.join(sorted(found))}", "Move them to one CUDA device.")
    if first.device.type != "cuda" and not _interpreted(where):
        raise KernelError(
            where,
            f"the tensors are on {first.device}, expected a CUDA device",
            "Move them there, or set TRITON_INTERPRET=1 before the start to interpret the kernels on the CPU.",
        )


def require_triton(where: str) -> None:
    """Refuses what needs triton where it is missing.

    Raises:
        RuntimeMissingError: if triton is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeMissingError(where, "triton is not installed", "Run `pip install 'hqc[gpu]'`.")


def _interpreted(where: str) -> bool:
    """Whether the kernels of this process run in triton's interpreter."""
    require_triton(where)
    from triton import knobs

    return bool(knobs.runtime.interpret)
