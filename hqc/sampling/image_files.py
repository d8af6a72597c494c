"""Images of a folder as what a program is calibrated on: [n, C, H, W] in -1…1, of the size that it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hqc.errors import TrainingError

__all__ = ["ImageFolder"]

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MODES = {1: "L", 3: "RGB"}


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
        return torch.stack([self._read(files[int(i)]) for i in torch.randint(len(files), (n,), generator=generator)])

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        channels, height, width = self.shape
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert(_MODES[channels]), (width, height), Image.Resampling.BICUBIC)
        except Exception as error:  # a damaged file may raise anything
            found = " ".join(str(error).split())[:100] or type(error).__name__
            raise TrainingError(str(path), f"cannot be read as an image ({found})", "Take it away.") from error
        pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32).reshape(height, width, channels))
        return pixels.permute(2, 0, 1) / 127.5 - 1
