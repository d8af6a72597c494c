"""Image tensors to PIL and PNG."""

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hqc.errors import EvaluationError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pil_from_tensor", "pixels_of", "png_from_pil"]


def pil_from_tensor(image: "Tensor") -> Image.Image:
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
    return Image.fromarray(pixels_of(image))


def pixels_of(image: "Tensor") -> NDArray[np.uint8]:
    """round(255·clamp(x, 0, 1)) of one image `[C, H, W]`: `[H, W]` of one channel, else `[H, W, C]`."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def png_from_pil(image: Image.Image) -> bytes:
    """The PNG file of an image, as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
