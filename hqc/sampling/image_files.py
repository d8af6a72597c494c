"""Images of a folder as tensors [n, C, H, W] in -1…1, of the size that a program takes.

Files are read as PNG, JPEG, WebP or BMP, whatever they are called, and no larger than memory is for: what else an image
library opens (vector graphics, documents) may run programs.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hqc.errors import TrainingError

__all__ = ["ImageFolder"]

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = {1: "L", 3: "RGB"}
_LARGEST_FILE = 256 * 2**20
_MOST_PIXELS = 2**26
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, each scaled to cover height and width and cut around its middle.

    shape: (C, H, W), grey or RGB.
    """

    folder: Path
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.shape[0] not in _MODES:
            found = f"give 1 or 3 channels, and the program takes {self.shape[0]}"
            raise TrainingError(f"--images {self.folder}", found, "Give task=Task(...) from Python.")
        if not self.files:
            what = "has no images" if self.folder.is_dir() else "is no folder"
            raise TrainingError(f"--images {self.folder}", what, f"Give a folder of {', '.join(_ENDINGS)} files.")

    @property
    def files(self) -> Sequence[Path]:
        """The images by name."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if path.suffix.lower() in _ENDINGS and path.is_file())

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """So many of them at random, [n, C, H, W]."""
        files = self.files
        return self.read([files[int(i)] for i in torch.randint(len(files), (n,), generator=generator)])

    def read(self, files: Sequence[Path]) -> Tensor:
        """These of them, [n, C, H, W].

        Raises:
            TrainingError: for a file that is no image, a damaged one, or one that is too large; naming it.
        """
        return torch.stack([self._read(path) for path in files])

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        channels, height, width = self.shape
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise ValueError(f"larger than {_LARGEST_FILE // 2**20} MiB")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, before it is decoded
                opened = Image.open(path, formats=_FORMATS)
            with opened as image:
                _require_fit(image)
                upright = ImageOps.exif_transpose(image).convert(_MODES[channels])
                fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
        except Exception as error:  # a damaged file may raise anything
            found = " ".join(str(error).split())[:100] or type(error).__name__
            raise TrainingError(str(path), f"cannot be read as an image ({found})", "Take it away.") from error
        pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32).reshape(height, width, channels))
        return pixels.permute(2, 0, 1) / 127.5 - 1


def _require_fit(image: Any) -> None:
    """Refuses an image by its header."""
    width, height = image.size
    if width * height > _MOST_PIXELS:
        raise ValueError(f"{width}x{height} pixels, more than {_MOST_PIXELS // 2**20} Mi")
    if image.mode not in _EIGHT_BITS:
        raise ValueError(f"pixels of the kind {image.mode}; expected 8 bits a channel")
