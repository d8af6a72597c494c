"""Pixels as the file that a request asks for."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["in_base64"]


def in_base64(pixels: NDArray[np.uint8], output_format: str, output_compression: int) -> str:
    """An image file in base64: of uint8 [H, W] or [H, W, 3]; PNG is lossless, and so is WebP at 100."""
    options = {
        "png": {},
        "jpeg": {"quality": max(1, output_compression), "subsampling": 0},
        "webp": {"lossless": True} if output_compression == 100 else {"quality": output_compression},
    }[output_format]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=output_format.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
