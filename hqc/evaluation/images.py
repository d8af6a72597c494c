"""Image tensors to PIL and PNG, and writing a file whole or not at all."""

import io
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from hqc.errors import ArtefactError, EvaluationError

__all__ = ["pil_from_tensor", "png_from_pil", "write_atomic"]


def pil_from_tensor(image: Tensor) -> Image.Image:
    """One image as 8-bit PIL: pixel = round(255·clamp(x, 0, 1)), `[C, H, W]` with C = 1 (grey) or 3 (RGB).

    Raises:
        EvaluationError: another shape.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise EvaluationError(
            "pil_from_tensor",
            f"the image has shape {list(image.shape)}, expected [1, H, W] or [3, H, W]",
            "Pass one grey or RGB image.",
        )
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()  # [C, H, W]
    if pixels.shape[0] == 1:
        return Image.fromarray(np.ascontiguousarray(pixels[0]))
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))  # [H, W, 3]


def png_from_pil(image: Image.Image) -> bytes:
    """The PNG file of an image, as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary file in the same folder, fsync, rename.

    Missing parent folders are made. The file gets the permissions that an ordinary `open` would give it.

    Raises:
        ArtefactError: the file cannot be written there; what stood at `path` before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise _unwritable(path, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o022)  # can only be read by setting it
    os.umask(mask)
    return mask


def _unwritable(path: Path, error: OSError) -> ArtefactError:
    return ArtefactError(str(path), f"cannot be written: {error.strerror}", "Choose a folder that takes it.")
