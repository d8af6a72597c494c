"""Image tensors to PIL and PNG."""

import io

import numpy as np
from PIL import Image
from torch import Tensor

from hqc.errors import EvaluationError

__all__ = ["pil_from_tensor", "png_from_pil"]


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
